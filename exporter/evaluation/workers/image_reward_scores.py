"""ImageReward: `python image_reward_scores.py JOBS.json` prints a line `score X` an image. Exit code 3: no package."""

import json
import sys
from pathlib import Path


def main() -> int:
    """Score every image of the job file against its prompt."""
    try:
        import ImageReward
    except ImportError as error:
        sys.stderr.write(f"image-reward cannot be imported: {error}\n")
        return 3
    model = ImageReward.load("ImageReward-v1.0")
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.stdout.write(f"score {float(model.score(job['prompt'], [job['image']]))!r}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
