"""HPSv2.1: `python hpsv2_scores.py JOBS.json` prints a line `score X` an image. Exit code 3: no package."""

import json
import sys
from pathlib import Path


def main() -> int:
    """Score every image of the job file against its prompt."""
    try:
        import hpsv2
    except ImportError as error:
        sys.stderr.write(f"hpsv2 cannot be imported: {error}\n")
        return 3
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        score = hpsv2.score(job["image"], job["prompt"], hps_version="v2.1")[0]
        sys.stdout.write(f"score {float(score)!r}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
