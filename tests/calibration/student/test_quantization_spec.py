from calibration.student.quantization_spec import W8A8, LayerSpec


def test_below_eight_bit_bounds_are_free_unless_symmetric():
    assert LayerSpec(4, 4, symmetric=False).fixed_qmin is None
    assert LayerSpec(4, 4, symmetric=False).levels == 15
    assert (LayerSpec(4, 4, symmetric=True).fixed_qmin, LayerSpec(4, 4, symmetric=True).levels) == (-7, 14)


def test_eight_bit_codes_are_all_of_int8():
    assert (W8A8.fixed_qmin, W8A8.fixed_qmin + W8A8.levels) == (-128, 127)


def test_a_weight_only_layer_has_no_fixed_bounds():
    assert LayerSpec(4, None, symmetric=True).fixed_qmin is None
