"""From what a user calls a model to a folder: as it is, or from the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vltrain.errors import VltrainError
from vltrain.hub_names import HUB_NAME

# All that the families' loaders read; a repository's own code is never among it.
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "qwen.tiktoken",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE*",
)
SAFETENSORS_FILES = ("model*.safetensors", "model.safetensors.index.json")
BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that lies in a folder."""

    path: Path
    revision: str | None  # the hub's commit hash; None for a folder of the user's
    name: str  # as the user wrote it

    @property
    def public_name(self) -> str:
        """The name for a report that travels: of a folder its own alone, not where it lies."""
        return Path(self.name).name if self.revision is None else self.name


def resolve_model(name: str, *, weights: bool = True) -> ResolvedModel:
    """The folder of a model, downloaded first if it is a name on the hub.

    From the hub come the files that a loader reads: safetensors, or the `.bin` shards where
    the repository has no safetensors. Without a connection the hub's cache answers.

    Args:
        name: a folder, or `org/name` with an optional `@revision` (branch, tag or commit).
        weights: whether they come down too; a processor does without.

    Raises:
        VltrainError: no such folder and no such name; or it is not cached and the hub cannot
            be reached, with what to download where.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ResolvedModel(path=folder, revision=None, name=name)
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise VltrainError.at(
            name,
            what="there is no such folder",
            fix="name the folder of a model, or a model on the hub as org/name",
        )
    snapshot = _download(match["repo"], match["revision"], weights=weights)
    return ResolvedModel(path=snapshot, revision=snapshot.name, name=name)


def fetch_weights(model: ResolvedModel) -> None:
    """Bring down the weights of a model that was resolved without them, of the same commit.

    Raises:
        VltrainError: as `resolve_model`.
    """
    if model.revision is not None:
        resolve_model(f"{model.name.partition('@')[0]}@{model.revision}")


def _download(repo: str, revision: str | None, *, weights: bool) -> Path:
    """The folder of a snapshot in the hub's cache; its name is the commit hash."""
    url = f"{constants.ENDPOINT}/{repo}"
    shown = f"{repo}@{revision}" if revision else repo
    try:
        return _snapshot(repo, revision, weights=weights)
    except GatedRepoError as error:
        what = "this model is only given to those who accept its terms"
        fix = f"accept them at {url}, then run `hf auth login`"
        raise VltrainError.at(shown, what=what, fix=fix) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        what = "there is no such folder, and no such model on the hub"
        fix = "check the spelling; a private model needs `hf auth login` first"
        raise VltrainError.at(shown, what=what, fix=fix) from error
    except RevisionNotFoundError as error:
        what = f"the model has no revision {revision}"
        fix = f"name a branch, a tag or a commit of {url}"
        raise VltrainError.at(shown, what=what, fix=fix) from error
    except LocalEntryNotFoundError as error:
        what = (
            "there is no such folder, the hub cannot be reached, and its cache "
            f"{constants.HF_HUB_CACHE} does not have the model whole"
        )
        raise VltrainError.at(shown, what=what, fix=_by_hand(repo, revision)) from error
    except (HTTPError, OSError) as error:
        what = f"the download broke off ({error})"
        fix = "run the same command again: what has come down is kept"
        raise VltrainError.at(shown, what=what, fix=fix) from error


def _snapshot(repo: str, revision: str | None, *, weights: bool) -> Path:
    """Fetch the needed files of one revision, or find them in the cache."""

    def fetch(*files: str) -> Path:
        chosen = {"allow_patterns": list(files), "ignore_patterns": ["*/*"]}
        try:
            return Path(snapshot_download(repo, revision=revision, **chosen))
        except HfHubHTTPError:
            raise  # the hub has answered
        except (OfflineModeIsEnabled, HTTPError):  # some versions ask it even for a cached commit
            return Path(snapshot_download(repo, revision=revision, local_files_only=True, **chosen))

    if not weights:
        return fetch(*DESCRIPTION_FILES)
    folder = fetch(*DESCRIPTION_FILES, *SAFETENSORS_FILES)
    if not any(folder.glob(SAFETENSORS_FILES[0])):
        folder = fetch(*DESCRIPTION_FILES, *BIN_FILES)
        if not any(folder.glob(BIN_FILES[0])):
            what = "no weights of it are there, neither safetensors nor pytorch_model*.bin"
            raise VltrainError.at(repo, what=what, fix=_by_hand(repo, revision))
    return folder


def _by_hand(repo: str, revision: str | None) -> str:
    """How to get a model onto a machine that cannot reach the hub."""
    at = f" --revision {revision}" if revision else ""
    return (
        f"where there is a connection, run `hf download {repo}{at} --exclude '*.py' "
        "--local-dir FOLDER`, copy FOLDER here and name it instead"
    )
