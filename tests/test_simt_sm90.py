"""The sm_90a wrappers' host bodies: held to the manual's text, and to recordings made on a GPU where there are any."""

from __future__ import annotations

import json

import pytest
import test_simt

programs = test_simt.programs
RECORDINGS = test_simt.SOURCES / "recordings"


@pytest.mark.parametrize("schedule", test_simt.SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
def test_wrappers(programs, schedule):
    done = test_simt.run(programs / "ptx_sm90", schedule=schedule)
    assert done.returncode == 0, done.stdout + done.stderr


def conformance(programs, command, folder):
    return test_simt.run(programs / "conformance", command, str(folder), schedule=("forward", 0))


def test_comparison_with_recordings_notices_every_changed_output(programs, tmp_path):
    done = conformance(programs, "record", tmp_path)
    assert done.returncode == 0, done.stderr
    assert conformance(programs, "compare", tmp_path).returncode == 0
    cases = json.loads((tmp_path / "index.json").read_text())
    assert len(cases) > 1
    for case in cases:
        path = tmp_path / f"{case['name']}.bin"
        recorded = bytearray(path.read_bytes())
        assert len(recorded) == 8 + case["input_bytes"] + case["output_bytes"]
        recorded[-1] ^= 0x40
        path.write_bytes(recorded)
    done = conformance(programs, "compare", tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("DIFFERS") == len(cases)


def test_hardware_agrees(programs):
    if not (RECORDINGS / "index.json").exists():
        pytest.skip("no recordings yet: tests/simt/conformance.cu makes them on a GPU")
    done = conformance(programs, "compare", RECORDINGS)
    assert done.returncode == 0, done.stdout + done.stderr
