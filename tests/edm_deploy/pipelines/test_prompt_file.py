import pytest

from edm_deploy.errors import InputError
from edm_deploy.pipelines.prompt_file import read_prompts


def test_a_prompt_is_a_line_and_empty_lines_are_ignored(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  Käse, 8 € \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("a cat", "Käse, 8 €")


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff\xfe", "cannot be read"), (b" \n\n", "holds no prompt")])
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.txt")
