"""The short forms of benchmarks/torture.py and benchmarks/fuzz.py, as processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def ratios(tmp_path, script, *arguments):
    """Run a script; its JSON as every benchmark writes it."""
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(tmp_path / "numbers.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {"name", "hardware", "versions", "rows", "ratios"} <= numbers.keys() and numbers["rows"]
    return numbers["ratios"]


def test_nothing_is_lost_by_kills_and_failing_writes(tmp_path):
    found = ratios(tmp_path, "torture.py", "--kills", "3", "--faults", "1", "--only", "run_3")
    assert found == {"kills": 3, "different": 0, "lost": 0, "write_faults": 1}


def test_no_damaged_file_is_taken_for_a_good_one(tmp_path):
    found = ratios(tmp_path, "fuzz.py", "--cases", "300")
    assert found["cases"] == 300 == found["refused"] + found["accepted"] and found["refused"] > 150
    assert found["slowest_seconds"] < 5 and found["most_memory_mb"] < 1024
