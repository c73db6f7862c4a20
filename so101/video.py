"""Reading films with the FFmpeg that comes with imageio: it decodes AV1, as LeRobot records, and OpenCV does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from so101_sim.errors import SO101Error


class VideoError(SO101Error):
    """A film cannot be read, or not to its end."""


def decode(file: Path, flags: tuple[str, ...] = ()) -> Iterator[np.ndarray]:
    """The pictures (H, W, 3) uint8, RGB, of a film, none left out and none twice.

    Args:
        file: the film.
        flags: options of FFmpeg for it.

    Raises:
        VideoError: FFmpeg reads no pictures from it.
    """
    import imageio_ffmpeg

    # an absolute path, since FFmpeg takes the beginning of a name with a colon for a protocol
    reader = imageio_ffmpeg.read_frames(
        str(file.absolute()), input_params=list(flags), output_params=["-fps_mode", "passthrough"]
    )  # fmt: skip
    try:
        width, height = next(reader)["size"]
        for content in reader:
            yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, ValueError) as error:
        raise VideoError(f"{file}: FFmpeg reads no pictures from it") from error
    finally:
        reader.close()
