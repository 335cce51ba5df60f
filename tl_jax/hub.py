"""A Hub id or a folder → config, image processor and tensors of one checkpoint.

A folder is used as it lies. A Hub id goes through `huggingface_hub`: its cache, its progress bars,
its offline mode (HF_HUB_OFFLINE=1); without network the cache serves. Only the files that are
needed are fetched. Pickle files (*.bin, *.pt) are never opened.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from tl_jax.errors import UserError, printable
from tl_jax.tensor_files import TensorReader, read_flax_msgpack, read_safetensors

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
HEAD = "head.safetensors"  # of a head that transformers does not know
HEAD_FIELD = "tl_jax_head"  # that describes it in config.json
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
TIMEOUT = 5.0  # seconds to wait for an answer
_LONGEST = 255  # bytes of a file's name
PATIENCE = 4.0  # seconds after which a failed request is not tried again
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
Result = TypeVar("Result")
Transport = tuple[type[Exception], ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A pretrained network on disk, its tensors not yet read.

    Attributes:
      source: the Hub id or folder as it was given.
      revision: the commit hash for a Hub id, None for a folder.
      folder: where the files lie.
      config: content of config.json.
      processor: content of preprocessor_config.json, None when there is none.
      tensors: readers by key in the file: dotted names (layout "torch") or paths joined with "/"
        (layout "flax").
      layout: of the arrays: "torch" (OIHW convolutions, [out, in] dense) or "flax".
      weight_files: the files that hold the tensors.
    """

    source: str
    revision: str | None
    folder: pathlib.Path
    config: dict[str, Any]
    processor: dict[str, Any] | None
    tensors: Mapping[str, TensorReader] = dataclasses.field(repr=False)
    layout: Literal["torch", "flax"]
    weight_files: tuple[pathlib.Path, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the weight files, one after the other; of one file what the Hub calls sha256."""
        digest = hashlib.sha256()
        for path in self.weight_files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint, downloads it if need be, and checks its files.

    Args:
      source: a folder (exists as one, or begins with "/", "." or "~"), else a Hub id
        ("microsoft/resnet-50").
      revision: branch, tag or commit of a Hub id; None is "main".

    Raises:
      UserError: what is missing, damaged or unreachable, where, and what to do.
    """
    folder = pathlib.Path(source).expanduser()
    if not (folder.is_dir() or source.startswith(("/", ".", "~"))):
        return _read(source, *_from_hub(source, revision))
    if revision is not None:
        raise UserError(f"{source} is a folder, which has no revision; got {revision!r}.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {source}.")
    return _read(source, folder.resolve(), None)


def _read(source: str, folder: pathlib.Path, revision: str | None) -> Checkpoint:
    names = {path.name for path in folder.iterdir()}
    if CONFIG not in names:
        raise UserError(
            f"{folder} holds no {CONFIG}. A checkpoint is a folder in Hugging Face format: "
            f"{CONFIG}, {PROCESSOR} and {WEIGHTS[0]}."
        )
    config = read_json(_inside(folder, CONFIG))
    processor = read_json(_inside(folder, PROCESSOR)) if PROCESSOR in names else None
    weights = choose_weights(names, str(folder))
    path = _inside(folder, weights)
    files: tuple[pathlib.Path, ...] = (path,)
    if weights == WEIGHTS[0]:
        tensors = read_safetensors(path)
    elif weights == WEIGHTS[1]:
        files, tensors = _read_shards(folder, path)
    else:
        tensors = read_flax_msgpack(path)
    if HEAD_FIELD in config and HEAD in names:
        head = read_safetensors(_inside(folder, HEAD))
        if twice := sorted(head.keys() & tensors.keys()):
            raise UserError(f"{folder}: {HEAD} and {weights} both hold {', '.join(twice)}.")
        files, tensors = (*files, folder / HEAD), {**tensors, **head}
    layout: Literal["torch", "flax"] = "flax" if weights == WEIGHTS[2] else "torch"
    return Checkpoint(source, revision, folder, config, processor, tensors, layout, files)


def choose_weights(names: Iterable[str], where: str) -> str:
    """The file to load, of those in a folder or repository.

    Raises:
      UserError: there is none that can be loaded.
    """
    names = set(names)
    for name in WEIGHTS:
        if name in names:
            return name
    pickles = sorted(n for n in names if n.endswith((".bin", ".bin.index.json", ".pt", ".pth")))
    if not pickles:
        raise UserError(f"{where} holds no weights; expected one of {', '.join(WEIGHTS)}.")
    raise UserError(
        f"{where} holds its weights only as pickle ({', '.join(pickles)}), which can run code and "
        "is never loaded here. Convert once, where PyTorch is installed and you trust the file: "
        "transformers.AutoModel.from_pretrained(PATH).save_pretrained(NEW_FOLDER); "
        "for a classifier with its head, AutoModelForImageClassification."
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file `name` of the folder, refused when it or its symlink leads out of it."""
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        allowed.append(folder.parents[2])  # a Hub cache: snapshots are symlinks to its blobs
    path = folder / name
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        raise UserError(
            f"{path} leads out of the folder (to {path.resolve()}), which is refused. "
            "Copy the file into the folder, or name the folder that holds it."
        )
    return path


def _shards(index: pathlib.Path) -> dict[str, set[str]]:
    """Tensor names by shard, from model.safetensors.index.json."""
    weight_map = read_json(index).get("weight_map")
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise UserError(f'{index} holds no "weight_map" from tensor names to file names.')
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    if wrong := [s for s in shards if printable(s) != s or len(s.encode()) > _LONGEST]:
        names = ", ".join(sorted(f"{shard!r:.80}" for shard in wrong))
        raise UserError(f"{index} names files by what is no file name: {names}.")
    if wrong := sorted(s for s in shards if not s.endswith(".safetensors") or "\0" in s):
        raise UserError(f"{index} names files that are not safetensors: {', '.join(wrong)}.")
    if wrong := sorted(s for s in shards if pathlib.PurePath(s).name != s or "\\" in s):
        raise UserError(f"{index} names files outside its folder: {', '.join(wrong)}.")
    return dict(sorted(shards.items()))


def _read_shards(
    folder: pathlib.Path, index: pathlib.Path
) -> tuple[tuple[pathlib.Path, ...], dict[str, TensorReader]]:
    shards = _shards(index)
    files = {shard: _inside(folder, shard) for shard in shards}
    if missing := [shard for shard, path in files.items() if not path.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(missing)}.")
    tensors: dict[str, TensorReader] = {}
    problems: list[str] = []
    for shard, expected in shards.items():
        found = read_safetensors(files[shard])
        problems += [f"{name} is not in {shard}" for name in sorted(expected - found.keys())]
        problems += [f"{shard} also holds {name}" for name in sorted(found.keys() - expected)]
        tensors |= found
    if problems:
        raise UserError(f"{index} and its files disagree: {'; '.join(problems)}.")
    return tuple(files.values()), tensors


def _from_hub(repo: str, revision: str | None) -> tuple[pathlib.Path, str]:
    """Folder and commit of a Hub id in the local cache, downloaded if need be."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    # The HTTP library behind huggingface_hub differs between its versions.
    transport: Transport = (errors.HfHubHTTPError.__bases__[0], OSError, RuntimeError)
    failures: Transport = (*transport, ValueError)  # ValueError: an answer that is no JSON
    named = f"{repo} at revision {revision!r}" if revision else repo

    def fetch(name: str, at: str | None) -> pathlib.Path:
        return pathlib.Path(
            _retried(
                lambda: huggingface_hub.hf_hub_download(
                    repo, name, revision=at, etag_timeout=TIMEOUT
                ),
                transport,
            )
        )

    try:
        if constants.HF_HUB_OFFLINE:
            return _from_cache(repo, revision, errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"))
        info = _retried(
            lambda: huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT),
            transport,
        )
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if CONFIG not in names:
            raise UserError(f"The Hub's {named} holds no {CONFIG}: not a transformers checkpoint.")
        weights = choose_weights(names, f"The Hub's {named}")
        folder = fetch(CONFIG, revision).parent  # by name, so that the cache knows the name
        commit = folder.name
        for name in names & {PROCESSOR, HEAD}:
            fetch(name, commit)
        path = fetch(weights, commit)
        for shard in _shards(path) if weights == WEIGHTS[1] else ():
            fetch(shard, commit)
        return folder, commit
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo!r} is neither a folder nor a Hub id (like microsoft/resnet-50): {error}"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{named} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in with "
            "`hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} is on the Hub, but has no revision {revision!r}; the revisions are listed at "
            f"{constants.ENDPOINT}/{repo}/tree/main."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo} is neither a folder here nor a model on {constants.ENDPOINT}. Check the "
            "spelling; a private model needs `hf auth login` (or HF_TOKEN)."
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            return _from_cache(repo, revision, error)
        raise UserError(f"The Hub does not have a file of {named}: {error}") from error
    except failures as error:
        return _from_cache(repo, revision, error)


def _from_cache(repo: str, revision: str | None, cause: Exception) -> tuple[pathlib.Path, str]:
    """The copy that an earlier download left in the cache."""
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(repo, CONFIG, revision=revision)
    if isinstance(cached, str):
        folder = pathlib.Path(cached).parent
        if not {path.name for path in folder.iterdir()}.isdisjoint(WEIGHTS):
            return folder, folder.name
    reason = cause.__cause__ or cause  # the hub's own message leads to what happened beneath
    raise UserError(
        f"{repo}{f' at revision {revision!r}' if revision else ''} is no folder here, not in the "
        f"cache {constants.HF_HUB_CACHE}, and cannot be downloaded ({constants.ENDPOINT}: "
        f"{reason}). Connect, or download it elsewhere (`hf download {repo} --local-dir FOLDER`), "
        "copy FOLDER here and use its path."
    ) from cause


def _retried(call: Callable[[], Result], transport: Transport) -> Result:
    """`call()`, again after failures that pass, for at most `PATIENCE` seconds."""
    start = time.monotonic()
    pause = 0.5
    while True:
        try:
            return call()
        except transport as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = status is not None and status < 500 and status not in (408, 429)
            lasting |= getattr(error, "errno", None) in DISK_ERRORS
            if lasting or time.monotonic() - start + pause > PATIENCE:
                raise
        time.sleep(pause)
        pause *= 2
