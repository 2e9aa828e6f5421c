"""Development sessions: ``nox -l`` lists them, ``nox`` runs tests, lint and types.

Most sessions share an environment, ``.nox/shared``. The benchmarks and the comparison of scripts
have one of their own, because of what other libraries pin, and so has every other version of
PyTorch. An environment is made from the pins in ``constraints.txt`` and made anew when what it was
made from has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()
CONSTRAINTS = ROOT / "constraints.txt"
SHARED = ROOT / ".nox" / "shared"
BENCH = ROOT / ".nox" / "bench"
CLEAN = ROOT / ".nox" / "clean"
DIST = ROOT / "dist"
# What PyTorch pins for itself.
WITH_TORCH = {"torch", "sympy", "networkx", "setuptools"}
FAMILIES = ("products", "solves", "low_rank", "kronecker", "scores", "memory")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests", "lint", "types"]


def _python_of(environment: Path) -> str:
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return str(environment / inside)


def _make_environment(session: nox.Session, environment: Path) -> str:
    """Make an empty virtual environment in place of whatever is there."""
    session.run(sys.executable, "-m", "venv", "--clear", str(environment), external=True)
    return _python_of(environment)


def _pip_install(
    session: nox.Session, python: str, *arguments: str, constraints: Path = CONSTRAINTS
) -> None:
    pip_install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    session.run(*pip_install, "-c", str(constraints), *arguments, external=True)


def _constraints_without_torch(environment: Path) -> Path:
    """Write the pins, but for those of PyTorch and of what it pins itself, into an environment."""
    pins = CONSTRAINTS.read_text("utf-8").splitlines()
    kept = [pin for pin in pins if pin.partition("==")[0] not in WITH_TORCH]
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n", "utf-8")
    return constraints


def _fingerprint(pyproject: dict[str, object], requirements: list[str]) -> str:
    """Hash what an environment depends on, and nothing that only configures tools."""
    tables = {key: pyproject[key] for key in ("build-system", "project")}
    # An editable installation and the scripts of an environment know where they are.
    made_from = [json.dumps([tables, requirements], sort_keys=True)]
    made_from += [CONSTRAINTS.read_text("utf-8"), sys.version, str(ROOT)]
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()


def _python_with(
    session: nox.Session,
    environment: Path,
    group: str,
    *alone: str,
    extras: str = "",
    torch: str = "",
) -> str:
    """Return the interpreter of an environment, made first where it is out of date.

    Args:
        session: The session that needs it.
        environment: Where it is.
        group: The dependency group that it has.
        alone: Groups that are installed without what they depend on.
        extras: Of the package, which is installed from its sources.
        torch: A version of PyTorch other than the pinned one.
    """
    pyproject = nox.project.load_toml(ROOT / "pyproject.toml")
    # The pip of a fresh environment may be too old for --group, so nox resolves the groups.
    requirements = list(nox.project.dependency_groups(pyproject, group))
    if torch:
        requirements.append(f"torch=={torch}")
    without_theirs = [r for name in alone for r in nox.project.dependency_groups(pyproject, name)]
    fingerprint = _fingerprint(pyproject, [*requirements, *without_theirs])
    stamp = environment / "made-from.sha256"
    if stamp.exists() and stamp.read_text("utf-8") == fingerprint:
        return _python_of(environment)

    session.log(f"making the environment {environment.name}; later sessions reuse it")
    python = _make_environment(session, environment)
    constraints = _constraints_without_torch(environment) if torch else CONSTRAINTS
    install = partial(_pip_install, session, python, constraints=constraints)
    # The build backend is in the group: without build isolation its version is pinned too.
    install(*requirements)
    if without_theirs:
        install("--no-deps", *without_theirs)
    install("--no-build-isolation", "--editable", f"{ROOT}{extras}")
    stamp.write_text(fingerprint, "utf-8")  # last: an interrupted installation leaves none
    return python


def _shared_python(session: nox.Session) -> str:
    return _python_with(session, SHARED, "dev", extras="[plot]")


def _run_script(session: nox.Session, script: Path, *arguments: str) -> None:
    # Figures go to files, with or without a display.
    environment = {"MPLBACKEND": "Agg"}
    python = _shared_python(session)
    session.run(python, str(script), *arguments, env=environment, external=True)


def _run_tests(session: nox.Session, python: str, *arguments: str) -> None:
    # Tests that share a cluster of processes run in one place.
    spread = ["-n", "2", "--dist", "loadgroup"]
    session.run(python, "-m", "pytest", *spread, *arguments, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    _run_tests(session, _shared_python(session), *session.posargs)


@nox.session
def programs(session: nox.Session) -> None:
    """Check what the programs of the gallery compute, print and draw."""
    _run_tests(session, _shared_python(session), "-m", "program", "tests", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    """Run the tests with another PyTorch: its version, then arguments for pytest, after --."""
    if not session.posargs or session.posargs[0].startswith("-"):
        session.error("which version? As in: nox -s torch -- 2.7.0")
    version, *arguments = session.posargs
    environment = ROOT / ".nox" / f"torch-{version}"
    python = _python_with(session, environment, "dev", extras="[plot]", torch=version)
    _run_tests(session, python, *arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, docstrings and formatting."""
    python = _shared_python(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, strictly."""
    session.run(_shared_python(session), "-m", "mypy", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with its gallery and check its links; a warning is an error."""
    strictly = ["-W", "--keep-going", "-n"]
    built = ROOT / "docs" / "_build" / "html"
    python = _shared_python(session)
    sphinx = [python, "-m", "sphinx", *strictly, "-b", "html"]
    session.run(*sphinx, "docs", str(built), *session.posargs, external=True)
    session.run(python, "docs/check_links.py", str(built), external=True)
    session.log(f"open {built / 'index.html'}")


@nox.session
def links(session: nox.Session) -> None:
    """Check where the documentation links to elsewhere, which needs a network."""
    to = ROOT / "docs" / "_build" / "linkcheck"
    # The pictures of the gallery play no part.
    quickly = ["-q", "-D", "sphinx_gallery_conf.plot_gallery=0"]
    sphinx = [_shared_python(session), "-m", "sphinx", "-b", "linkcheck", *quickly]
    session.run(*sphinx, "docs", str(to), *session.posargs, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Find the mislabelled digits; arguments after -- go to the example."""
    _run_script(session, ROOT / "examples" / "programs" / "mislabelled_digits.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside other libraries; families and options after --, e.g. products --quick."""
    families = [name for name in session.posargs if name in FAMILIES] or FAMILIES
    options = [option for option in session.posargs if option not in FAMILIES]
    python = _python_with(session, BENCH, "benchmarks", "peers")
    for family in families:
        script = ROOT / "benchmarks" / f"{family}.py"
        session.run(python, str(script), *options, external=True)


@nox.session
def migration(session: nox.Session) -> None:
    """Run scripts of other libraries beside theirs here; libraries after --, e.g. dattri."""
    python = _python_with(session, BENCH, "benchmarks", "peers")
    folder = ROOT / "examples" / "migration"
    quietly = [python, "-W", "ignore"]  # what the other libraries warn of at import
    session.run(*quietly, str(folder / "side_by_side.py"), *session.posargs, external=True)
    session.run(*quietly, str(folder / "public_names.py"), external=True)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel without extras elsewhere and import it."""
    for old in [*DIST.glob("hessops-*.whl"), *DIST.glob("hessops-*.tar.gz")]:
        old.unlink()
    # The wheel is built from the sdist, so both are tried.
    build_command = [_shared_python(session), "-m", "build", "--no-isolation"]
    session.run(*build_command, "--outdir", str(DIST), external=True)
    (wheel,) = DIST.glob("hessops-*.whl")

    python = _make_environment(session, CLEAN)
    _pip_install(session, python, str(wheel))
    with session.chdir(CLEAN):  # away from the sources
        session.run(python, "-c", IMPORT_CHECK, external=True)


IMPORT_CHECK = """
import pathlib, sys, hessops
assert (pathlib.Path(hessops.__file__).parent / "py.typed").exists(), "py.typed is missing"
extras = {"cupy", "dask", "distributed", "zarr", "matplotlib"} & set(sys.modules)
assert not extras, f"importing hessops imported {sorted(extras)}"
missing = [name for name in hessops.__all__ if not hasattr(hessops, name)]
assert not missing, f"__all__ names what is not there: {missing}"
print("hessops", hessops.__version__, "imports without the extras")
"""
