"""FIPO's experiment: `python experiment.py --out_dir=run_i` trains, saves, probes and reports; nothing else to give.

The folder's last name picks `experiments/run_i.yaml`; the environment variable FIPO_WORKLOAD picks model and text
(default `minilm`: all-MiniLM-L6-v2, layers 1, 3 and 5, about six minutes on two cores).
"""

import argparse
import signal
import sys
from pathlib import Path

from fipo.errors import EXIT_CODE, UserError
from fipo.output import standard_output


def main() -> int:
    """Run, or say in one line why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out_dir", type=Path, required=True, help="result folder; its last name is the run, run_0 ..."
    )
    arguments = parser.parse_args()
    try:
        from fipo import job

        with standard_output():
            job.run(arguments.out_dir, Path(__file__).parent / "experiments")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # who reads the table has seen enough
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stopped:
        print(f"{str(stopped) or 'stopped'}; give the same command to go on", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
