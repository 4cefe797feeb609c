"""What the tests of the kit share: a wheel of a subject on the path, and the kit run on it in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from kit_run import Kit, Run

HERE = Path(__file__).parent


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kit:
    """Install a plugin as a wheel of the name `subject` for the time of the test, and run the kit on it from an empty folder."""

    def run(
        plugin: str,
        *options: str,
        tests: tuple[str, ...] = ("commplane_conformance",),
        backend: str = "subject",
        kind: str = "backend",
    ) -> Run:
        site = tmp_path / "site"
        info = site / "subject-1.0.dist-info"
        if not info.exists():
            info.mkdir(parents=True)
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: subject\nVersion: 1.0\n")
            (tmp_path / "empty").mkdir()
            (tmp_path / "empty" / "pytest.ini").write_text("[pytest]\n")
        (info / "entry_points.txt").write_text(f"[commplane.plugins]\nsubject = {plugin}\n")
        for folder in (str(site), str(HERE)):
            monkeypatch.syspath_prepend(folder)
        # The ranks get this process's path; what the kit starts with a fresh interpreter gets it from here.
        inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(HERE), *inherited]))
        monkeypatch.chdir(tmp_path / "empty")
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        arguments = [f"--commplane-{kind}", backend] if backend else []
        capfd.readouterr()
        code = pytest.main(
            ["-p", "no:cacheprovider", "--pyargs", *tests, *arguments, "--commplane-report", str(report), *options]
        )
        out, err = capfd.readouterr()
        for name in Path("/dev/shm").glob(f"subject-{tmp_path.name}-*"):  # what a wrong one leaks, and the kit has counted
            name.unlink()
        # Read anew for the next subject.
        for name in [n for n in sys.modules if n.endswith("_plugins") or n.startswith("wrong_")]:
            del sys.modules[name]
        return Run(int(code), json.loads(report.read_text()) if report.exists() else {}, out + err)

    return run
