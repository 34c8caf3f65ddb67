from edm_deploy.export.plugin_schema import CONV, NAMESPACE, PLUGINS, QUANTIZE


def test_each_input_and_the_output_has_its_type():
    for plugin in PLUGINS:
        assert len(plugin.types) == len(plugin.inputs) + 1


def test_what_one_plugin_puts_out_the_other_takes_in():
    assert QUANTIZE.types[-1] == CONV.types[CONV.inputs.index("codes")] == "INT8"


def test_attributes_and_inputs_bear_no_name_that_tensorrt_keeps_for_itself():
    for plugin in PLUGINS:
        names = plugin.inputs + plugin.attributes
        assert len(set(names)) == len(names)
        assert not {"outputs", "stream", "tactic", "plugin_namespace", "plugin_version", "aot"} & set(names)


def test_the_namespace_is_not_one_of_tensorrt():
    assert NAMESPACE not in {"", "trt", "tensorrt", "std"}
    assert "." not in NAMESPACE
