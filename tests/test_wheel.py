"""What is installed from a wheel, in an environment that has never seen this directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tiny_run import digests, write_inputs

from gpt2repro.recipe import recipes_directory

ROOT = Path(__file__).parent.parent


def run(*command, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, and this one's libraries but not its code."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a copy: building leaves directories behind
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation")
    run(*pip, "wheel", *options, "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "bare", cwd=place)
    python = place / "bare" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=place)
    # A path that a .pth file names is not searched for .pth files itself: an editable install of
    # this directory, if there is one, stays unknown.
    (site,) = (place / "bare").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_all_rooms_and_recipes_are_in_it(bare, tmp_path):
    code = """if True:
        import gpt2repro, pkgutil, modeling_gpt2repro
        from gpt2repro.recipe import recipes_directory
        print(gpt2repro.__file__, modeling_gpt2repro.__file__, sep="\\n")
        print(*sorted(m.name for m in pkgutil.walk_packages(gpt2repro.__path__, "gpt2repro.")))
        print(*sorted(path.name for path in recipes_directory().iterdir() if path.suffix))
    """
    shown = run(bare / "python", "-c", code, cwd=tmp_path).splitlines()
    package, model, modules, recipes = shown
    assert package.startswith(str(bare.parent)) and model.startswith(str(bare.parent))
    files = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("gpt2repro/**/*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in files} - {"gpt2repro"}
    assert set(modules.split()) - {"gpt2repro.recipes"} == names
    assert recipes.split() == sorted(path.name for path in recipes_directory().glob("*.yaml"))


def test_its_command_and_a_training_step(bare, tmp_path):
    assert "stream-stats" in run(bare / "gpt2repro", "--help", cwd=tmp_path)
    recipe = write_inputs(tmp_path)
    output = tmp_path / "run"
    options = ("--recipe", recipe, "--output_dir", output, "--num_steps", "1")
    run(
        *(bare / "python", "-m", "train_accelerate", *options),
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    assert [*digests(output)] == [0]
    assert (output / "final" / "model.safetensors").is_file()
