"""Film of an arm that practises: the first filmed episode that failed beside the last one that succeeded.

    python benchmark/practice_film.py --run logs/benchmark/practice/lift/seed_1 --out assets/practice.gif

Each half shows the reset and the episode as the arm's camera saw them, with outlines of tape and sheet.
"""

import dataclasses
import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.cli import check_output, parse, run_script
from so101.learner import EPISODES
from so101_env import SO101Error

CAPTION_PX = 16


@dataclasses.dataclass
class Args:
    run: str
    """directory of a run of so101.practice"""
    out: str
    """GIF to write"""


def read_film(run: Path, success: bool) -> tuple[str, list[Image.Image], int]:
    """Caption, pictures and ms per picture of the first filmed failure, or of the last filmed success."""
    if not (run / EPISODES).exists():
        raise SO101Error(f"--run {run}: has no {EPISODES}; name the directory of a run of so101.practice")
    records = {round(each["arm_time_s"]): each for each in map(json.loads, (run / EPISODES).read_text().splitlines())}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    films = [each for each in events.Images("last_episode") if records[each.step]["success"] == success]
    if not films:
        raise SO101Error(f"--run {run}: has no film of {'a success' if success else 'a failure'}")
    film = films[-1 if success else 0]
    record, picture = records[film.step], Image.open(io.BytesIO(film.encoded_image_string))
    outcome = "success" if success else "time-out"
    text = f"{film.step / 60:.0f} min, episode {record['episode']}: {outcome}"
    return text, [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)], picture.info["duration"]


def main() -> int:
    """Write the film; returns the exit code."""
    args = parse(Args, __doc__)
    check_output("--out", args.out, (".gif",), args.run)
    halves = [read_film(Path(args.run), success) for success in (False, True)]
    width, height = halves[0][1][0].size
    pictures = []
    for i in range(max(len(frames) for _, frames, _ in halves)):
        picture = Image.new("RGB", (2 * width, height + CAPTION_PX), "white")
        for x, (text, frames, _) in zip((0, width), halves):
            picture.paste(frames[min(i, len(frames) - 1)], (x, CAPTION_PX))
            ImageDraw.Draw(picture).text((x + 3, 2), text, fill="black")
        pictures.append(picture.quantize(64))
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=halves[0][2], loop=0)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
