"""Models of the Hugging Face hub: from its cache where they are there, else downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import HostError, RecipeError
from pipeline.models.checkpoint import (
    CODE,
    COMPANIONS,
    INDEX,
    check_code_files,
    read_config,
    read_json,
    weight_files,
)


def hub_snapshot(name: str, revision: str | None, *, download: bool, trust_remote_code: bool = False) -> Path:
    """Folder of the hub's snapshot, from its cache where it is there whole.

    Raises: RecipeError where there is no such model or revision; HostError where it cannot be had here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*COMPANIONS, "*.safetensors", INDEX, *([CODE] if trust_remote_code else [])]

    def find() -> Path:
        try:
            found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
            config = read_config(found, trust_remote_code=True)  # whether it may run is asked later
            weight_files(found)
            if trust_remote_code:
                check_code_files(found, config)
            return found
        except (LocalEntryNotFoundError, RecipeError):  # not there, or a download that was interrupted
            if not download:
                raise
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        try:
            weight_files(found)
        except RecipeError as error:  # pickles are not downloaded; without a network, what is there is all there is
            raise RecipeError(
                f"the model {name!r} has no whole set of safetensors: {error.message}",
                hint="its download was cut short and the hub cannot be reached now; or its weights are pickles, to be "
                "converted where you trust them: AutoModelForCausalLM.from_pretrained(ID).save_pretrained(NEW)",
            ) from None
        return found

    return _explained(find, name, revision, download=download)


def hub_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a model on the hub, without its weights.

    Raises: as `hub_snapshot`.
    """
    from huggingface_hub import hf_hub_download

    return read_json(
        _explained(lambda: Path(hf_hub_download(name, "config.json", revision=revision)), name, revision, download=True)
    )


def _explained(find: Callable[[], Path], name: str, revision: str | None, *, download: bool) -> Path:
    """`find()`, with the hub's errors as ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return find()
    except GatedRepoError:
        raise HostError(
            f"the model {name!r} is gated", hint="accept its licence on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise RecipeError(f"the model {name!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise RecipeError(
            f"there is no model {name!r} on the hub, or it is private", hint="a private one needs `hf auth login`"
        ) from None
    except HFValidationError as error:
        raise RecipeError(f"{name!r} is not a hub id (OWNER/NAME): {error}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise RecipeError(f"the model {name!r} has no config.json on the hub") from None
        at = f" at {revision}" if revision else ""
        why = "is not in the local cache" if not download else "is not in the local cache and the hub cannot be reached"
        raise HostError(
            f"the model {name!r}{at} {why} ({type(error).__name__})",
            hint="`pipeline run` downloads it"
            if not download
            else "download it where there is a network, and give its folder: model: {path: FOLDER}",
        ) from None
