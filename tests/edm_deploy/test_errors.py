import pytest

from edm_deploy.errors import ArtifactError, EdmDeployError, InputError, UnsupportedError, first_line, flag


@pytest.mark.parametrize("error", [ArtifactError, InputError, UnsupportedError])
def test_one_class_catches_what_a_user_can_mend(error):
    assert issubclass(error, EdmDeployError)


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one thing.\nand more", "one thing"),
        ("\n\n  the second line\n", "the second line"),
        ("", "RuntimeError"),
        ("\n \n", "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_says_something(message, line):
    assert first_line(RuntimeError(message)) == line


def test_an_option_is_named_as_it_is_typed():
    assert flag("image_tokens") == "--image-tokens"
