"""The documentation: every command and snippet runs, every link and path leads somewhere, every page is in the table of contents."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import engines
from calibration import passes, recipes
from calibration.recipe import Recipe
from calibration.run.options import RunOptions
from edm_deploy import registry
from edm_deploy.errors import flag
from edm_deploy_tools.cli import app
from tests.conftest import TINY_UNET
from tests.documentation import LANGUAGES, ROOT, RUN_LANGUAGES, Block, Runner, blocks_of, commands_of, smallest

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
QUICKSTART = ROOT / "docs" / "quickstart.md"  # makes the directories that the pages on single tasks begin with
RUN = [
    page for page in PAGES if page != QUICKSTART and any(block.language in RUN_LANGUAGES and not block.marker for block in blocks_of(page))
]
EXTENDED = [page for page in PAGES if any(block.marker == "extended" for block in blocks_of(page))]
OTHER_PROGRAMS = {  # options that pages name besides those of edm-deploy's commands
    *("--help", "--architecture", "--size", "--backends", "--layers", "--step"),  # bench_scale, roofline
    *("--kills", "--images", "--kill-every", "--count"),  # the soaks of sets and of the server; Triton's client
    *("--backend-directory", "--load-model", "--model-control-mode", "--model-repository"),  # tritonserver
    *("--cpu", "--multi", "--num", "--multi_gpu", "--num_processes", "--logdir"),  # accelerate launch, tensorboard
    *("--fold-constants", "--no-fold-shapes"),  # polygraphy
}
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]+)?\)")
PATH = re.compile(r"`((?:edm_deploy|calibration|engines|tools|tests|docs)/[\w/.-]+)`")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Tiny models by the names that the documentation gives to real ones."""
    from tests.tiny_pipelines import saved
    from tests.tiny_transformers import tiny_pipeline

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    DDIMPipeline(unet=UNet2DModel(**TINY_UNET), scheduler=DDIMScheduler()).save_pretrained(root / "unet")
    tiny_pipeline("dit").save_pretrained(root / "dit")
    (root / "prompts.txt").write_text(
        "a red bicycle\na black cat\n"
    )  # each character is a token of the tiny tokenizer: no room for the built-in list
    latent = [str(saved(root / "stable-diffusion")), "--prompts", str(root / "prompts.txt")]
    return {name: [str(root / "unet")] for name in ("google/ddpm-cifar10-32", "MODEL")} | {
        "facebook/DiT-XL-2-256": [str(root / "dit")],
        "stable-diffusion-v1-5/stable-diffusion-v1-5": latent,
    }


@pytest.fixture(scope="module")
def quickstart(models: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the quickstart was followed."""
    path = tmp_path_factory.mktemp("quickstart")
    follow(QUICKSTART, path, models, extended=False)
    return path


def follow(page: Path, directory: Path, models: dict[str, list[str]], *, extended: bool) -> None:
    """Run a page's blocks in a directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        runner = Runner(models, patch)
        for block in blocks_of(page):
            if block.language in RUN_LANGUAGES and block.marker != "not run" and (extended or not block.marker):
                runner.run(block)


def test_the_quickstart_can_be_followed(quickstart):
    assert {"w8a8", "onnx", "engine", "images", "report"} <= {path.name for path in quickstart.iterdir()}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_command_and_snippet_of_a_page_runs(page, models, quickstart, tmp_path):
    if page.stem == "README":  # complete in itself
        (tmp_path / "work").mkdir()
    else:
        shutil.copytree(quickstart, tmp_path / "work")
    follow(page, tmp_path / "work", models, extended=False)


@pytest.mark.extended
@pytest.mark.parametrize("page", EXTENDED, ids=lambda page: page.stem)
def test_the_slow_commands_of_a_page_run_too(page, models, quickstart, tmp_path):
    shutil.copytree(quickstart, tmp_path / "work")
    follow(page, tmp_path / "work", models, extended=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    blocks = blocks_of(page)
    assert [str(block) for block in blocks if block.language not in LANGUAGES] == [], f"expected one of {LANGUAGES} behind the fence"
    commands = [
        str(block)
        for block in blocks
        if block.language not in RUN_LANGUAGES and re.search(r"^(edm-deploy|make|pip|python) ", block.text, re.MULTILINE)
    ]
    assert commands == [], "commands are in bash blocks, which are run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor[1:] not in anchors_of(file)):
            broken.append(target + anchor)
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_of_the_repository_that_a_page_names_exists(page):
    named = set(PATH.findall(page.read_text()))
    added = {block.text.split("\n")[0].removeprefix("# ") for block in blocks_of(page) if block.language == "python"}
    assert sorted(name for name in named - added if not (ROOT / name).exists() and not (ROOT / name.replace("<name>", "")).exists()) == []


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and f"({page.name})" not in index] == []


def named(page: str) -> set[str]:
    """Words in code style of a page of docs/."""
    return {
        word.partition("=")[0].strip()
        for code in re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text())
        for word in code.split(",")
    }


def test_the_reference_lists_every_command_extra_and_common_setting():
    commands = set(typer.main.get_command(app).commands)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    settings = {field.name for options in (Recipe, RunOptions) for field in dataclasses.fields(options)}
    text = (ROOT / "docs" / "reference.md").read_text()
    assert sorted((commands | extras | settings) - set(re.findall(r"`([\w-]+)`", text))) == []


def test_the_defaults_in_the_reference_are_those_of_the_recipes():
    text = (ROOT / "docs" / "reference.md").read_text()
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|[^|]*\|$", text[text.index("## Settings") : text.index("Options of a run")], re.MULTILINE)
    )
    for setting, row in rows.items():
        default, _, others = (part.strip() for part in row.partition("|"))
        other, _, of = others.partition(":")
        for name in registry.names(recipes):
            expected = other if f"`{name}`" in of else default
            actual = {field.name: field.default for field in dataclasses.fields(registry.load(recipes, name, "RECIPE"))}[setting]
            assert str(actual).lower() == expected, f"{setting} of {name}"
    assert set(rows) == {field.name for field in dataclasses.fields(Recipe)}


def test_every_recipe_pass_and_backend_is_on_the_page_of_its_task():
    assert sorted({*registry.names(recipes), *registry.names(passes)} - named("quantize.md")) == []
    assert sorted(set(registry.names(engines)) - named("build.md")) == []


@pytest.mark.parametrize("name", registry.names(engines))
def test_the_options_of_a_backend_are_those_that_it_has(name):
    (row,) = (line for line in (ROOT / "docs" / "build.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert set(re.findall(r"--[\w-]+", row)) == {flag(option) for option in engines.backend_named(name).options}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "kernels.md"], ids=lambda page: page.stem)
def test_every_option_that_a_page_names_is_one_of_a_command(page):
    command = typer.main.get_command(app)
    options = {
        name for one in (command, *command.commands.values()) for option in one.params for name in (*option.opts, *option.secondary_opts)
    }
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-[a-z0-9]+)*\b(?!-)", page.read_text())) - options - OTHER_PROGRAMS) == []


def test_a_block_is_found_with_its_line_language_and_marker(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- not run: needs a GPU -->\n```bash\nmake \\\n  demo # all\n\nmake test\n```\n\n```python\nx = 1\n```\n")
    first, second = blocks_of(page)
    assert (first.line, first.language, first.marker) == (5, "bash", "not run")
    assert commands_of(first) == [(5, ["make", "demo"]), (8, ["make", "test"])]
    assert second == Block(page, 12, "python", "x = 1\n", "")


def test_a_command_runs_with_the_least_work():
    assert smallest(["finetune", "m", "--out", "a", "--set", "steps=2000", "--set", "rank=8", "--rows", "20"]) == (
        [
            "finetune",
            "m",
            "--out",
            "a",
            "--set",
            "rank=8",
            "--rows",
            "2",
            "--set",
            "calibration_samples=2",
            "--set",
            "steps=2",
            "--set",
            "batch=2",
        ]
    )
    assert smallest(["build-engine", "o", "--out", "e", "--height", "64:64:96"]) == [
        "build-engine",
        "o",
        "--out",
        "e",
        "--height",
        "8:8:16",
    ]
    assert smallest(["finetune", "m", "--out", "a", "--resume"])[:4] == ["finetune", "m", "--out", "a"]
    assert smallest(["calibrate", "--help"]) == ["calibrate", "--help"]


def test_a_failing_command_fails_with_its_page_and_line(models, tmp_path):
    block = Block(ROOT / "README.md", 7, "bash", "\nedm-deploy export missing --out onnx\n", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(pytest.fail.Exception, match=r"README\.md:8: .*exit code 2"):
            Runner(models, patch).run(block)
