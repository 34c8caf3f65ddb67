import pytest

from edm_deploy.errors import ArtifactError, EdmDeployError, InputError, UnsupportedError


@pytest.mark.parametrize("error", [ArtifactError, InputError, UnsupportedError])
def test_one_class_catches_what_a_user_can_mend(error):
    assert issubclass(error, EdmDeployError)


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
