"""``tandem transcribe``: speech to text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.cli.tasks import Target, without_none
from cluster.client.speech import TRANSCRIPTIONS, TRANSLATIONS
from cluster.errors import DataError


def transcribe(file: Path, fields: Mapping[str, Any], target: Target, *, translate: bool) -> None:
    """Print the transcript of a file; plain text is printed while it is generated.

    Raises:
        DataError: The file cannot be read.
    """
    path = TRANSLATIONS if translate else TRANSCRIPTIONS
    form = without_none(fields)
    try:
        content = file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    with content, target.connect() as router:
        if form["response_format"] != "text":
            text = router.upload_for_text(path, file.name, content, form)
            print(text, end="" if text.endswith("\n") else "\n")
            return
        for event in router.upload_for_events(path, file.name, content, {**form, "stream": "true"}):
            if event.get("type") == "transcript.text.delta":
                print(event["delta"], end="", flush=True)
    print()
