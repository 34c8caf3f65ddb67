import pytest

from calibration.data.prompts import PROMPTS, prompts_of
from edm_deploy.errors import InputError


def test_the_built_in_prompts_are_sixty_four_different_ones():
    assert len(set(PROMPTS)) == len(PROMPTS) == 64


def test_a_file_holds_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert prompts_of(tmp_path / "p.txt") == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n\n", "holds no prompt"), (b"\xff\xfe\x00", "cannot be read"), (None, "cannot be read")]
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prompts_of(tmp_path / "p.txt")
