"""The file of expected failures is one that the conformance kit takes: the ids are those of its tests for this backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXPECTED = Path(__file__).parents[1] / "conformance-expected-failures-cuda.txt"


@pytest.mark.long
@pytest.mark.timeout(60)
def test_the_kit_has_every_test_that_is_expected_to_fail_on_gpus(tmp_path: Path) -> None:
    pytest.importorskip("commplane_conformance", reason="wants commplane-conformance: pip install commplane-conformance")
    command = [sys.executable, "-m", "pytest", "--pyargs", "commplane_conformance", "--commplane-backend=flashinfer"]
    command += ["--commplane-device=cuda", "--commplane-ranks=2,4,8", f"--commplane-expected-failures={EXPECTED}"]
    done = subprocess.run([*command, "--collect-only", "-q"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    lines = [line.partition("  #")[0] for line in EXPECTED.read_text().splitlines() if not line.startswith("#")]
    assert all(f"test_{line}" in done.stdout for line in lines)
