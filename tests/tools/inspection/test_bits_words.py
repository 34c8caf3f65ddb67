from edm_deploy_tools.inspection.bits_words import allocation_words, relaxed_words


def test_sites_with_more_bits_than_the_recipe_are_named(artifact_w4a4):
    from dataclasses import replace

    assert allocation_words(artifact_w4a4).startswith("none")
    assert allocation_words(replace(artifact_w4a4, provenance={"allocation": {"conv_in": {}}})) == (
        f"1 of {len(artifact_w4a4.sites)} sites with more bits than the recipe's, 1 at W8A8: conv_in"
    )


def test_relaxed_timesteps_are_described():
    assert relaxed_words((), None) == "none"
    assert relaxed_words(((0, 199), (900, 999)), 16).startswith("timesteps 0 to 199, 900 to 999: activations in floating point")
    assert relaxed_words(((800, 999),), 8) == "timesteps 800 to 999: inputs of 8 bits, in a second graph of the same weights"
