"""The installed models: one folder each, described by a manifest that is written last.

    models/7b@q4_k_m/manifest.json      "7b:q4_k_m"; the colon means something else on some systems
    models/7b@q4_k_m/*.gguf

What has no manifest is no model: it is never listed, and swept at the next start once its maker is gone.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2_local import files, paths
from qwen2_local.catalog import SIZES, how_to_get, lookup, suggestions
from qwen2_local.errors import BadFile, UnknownModel, UnsupportedModel, UsageError
from qwen2_local.formats.check_gguf import split_parts
from qwen2_local.formats.checkpoint import is_mlx
from qwen2_local.formats.magic import not_a, open_regular
from qwen2_local.manifest import Manifest

_MANIFEST = "manifest.json"
_FETCHED = "fetched"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(:[a-z0-9][a-z0-9._-]*)?")


@dataclass(frozen=True, slots=True)
class Installed:
    """A model in the store. manifest: None where it cannot be used; `note` says why ("made by a newer version")."""

    name: str
    folder: Path
    manifest: Manifest | None
    note: str = ""

    @property
    def path(self) -> Path:
        """What a backend is given: the first GGUF file, or the MLX folder."""
        if self.manifest is not None and self.manifest.format == "gguf":
            return self.folder / min(file.name for file in self.manifest.files if file.name.endswith(".gguf"))
        return self.folder


@dataclass(slots=True)
class Draft:
    """A model being made: put its files into `folder`, and set `manifest` as the last thing."""

    folder: Path
    manifest: Manifest | None = None


class Store:
    """The models in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """The store in `folder` (default: `paths.models()`). Sweeps what crashes left behind."""
        self.folder = folder or paths.models()
        files.sweep(self.folder)

    def list(self) -> list[Installed]:
        """All models, by name; also those that cannot be used, with a note. Nothing half-made. Never raises for what lies there."""
        if not self.folder.is_dir():
            return []
        return [self._open(folder) for folder in sorted(self.folder.iterdir()) if _is_model(folder)]

    def get(self, name: str) -> Installed:
        """The model of exactly this name, usable. Raises UnknownModel, UnsupportedModel (newer version), BadFile (a file missing or cut short)."""
        folder = self.place(name)
        if not _is_model(folder):
            raise UnknownModel(f'no model is called "{name}".', hint="See `qwen2-local ls`.")
        manifest = _read(folder, name)
        for file in manifest.files:
            path = files.inside(folder, folder / file.name)
            size = path.stat().st_size if path.is_file() else 0
            if size != file.size:
                hint = f"`qwen2-local rm {name}`, then get it again."
                raise BadFile(f"{folder / file.name} is damaged: {file.size} bytes are expected, it has {size}.", hint=hint)
        return Installed(name, folder, manifest)

    def remove(self, name: str) -> None:
        """Deletes a model, whole or not at all. Raises UnknownModel, UsageError if the store cannot be written."""
        folder = self.place(name)
        if not _is_model(folder):
            raise UnknownModel(f'no model is called "{name}".', hint="See `qwen2-local ls`.")
        self._require_writable()
        files.remove_folder(folder)

    @contextmanager
    def add(self, name: str) -> Iterator[Draft]:
        """Makes the model `name`: it is there when the block ends well, and not before; else nothing is.

        Raises UsageError for an impossible or taken name, while another process makes it, and where the store cannot be written;
        DoesNotFit on a full disk.
        """
        with self.reserve(name) as folder, files.staging(folder) as building:
            draft = Draft(building)
            yield draft
            if draft.manifest is None or draft.manifest.name != name:
                raise ValueError(f"the draft of {name} has no manifest of that name")
            self.seal(building, draft.manifest)

    @contextmanager
    def reserve(self, name: str) -> Iterator[Path]:
        """The folder that will be the model `name`, for whoever makes it himself: nobody else makes it during the block. Raises as `add` does."""
        folder = self.place(name)
        self._require_writable()
        with files.lock(folder.with_name(f".{folder.name}.lock"), what=name):
            yield folder

    @staticmethod
    def seal(folder: Path, manifest: Manifest) -> None:
        """Makes `folder`, still under another name, a model: the manifest is its last file."""
        files.write_file(folder / _MANIFEST, manifest.dump())
        Manifest.read(folder / _MANIFEST)

    @staticmethod
    def unseal(folder: Path) -> None:
        """Takes the manifest away that an earlier run has written."""
        (folder / _MANIFEST).unlink(missing_ok=True)

    @contextmanager
    def resume(self, name: str, *, replace: bool = False) -> Iterator[Draft]:
        """Like `add`, but what lies in the draft's folder stays when the block or the process fails, and is there the next time.

        A block that ends well without a manifest has no more use for it: then it goes. replace: take the place of the model `name`, if there
        is one, at the very end. Raises as `add` does.
        """
        with self.reserve(name) as folder, files.disk_errors(folder), files.partial(folder) as kept:
            if not replace:
                files.refuse_existing(folder)
            made = kept / _FETCHED
            made.mkdir(mode=0o700, exist_ok=True)
            draft = Draft(made)
            yield draft
            if draft.manifest is not None:
                if draft.manifest.name != name:
                    raise ValueError(f"the draft of {name} has the manifest of {draft.manifest.name}")
                self.seal(made, draft.manifest)
                files.sync_tree(made)
                files.publish(made, folder, overwrite=replace)
            files.remove_folder(kept)

    def unfinished(self, name: str) -> Path:
        """Where `resume` keeps what there is of `name` so far; perhaps not there."""
        return files.partial_of(self.place(name)) / _FETCHED

    def drafts(self) -> tuple[str, ...]:
        """The names of all unfinished models, those that are being made included."""
        folders = self.folder.glob(files.partial_of(self.folder / "*").name) if self.folder.is_dir() else []
        names = sorted(files.final_of(folder).name.replace("@", ":") for folder in folders)
        return tuple(name for name in names if _NAME.fullmatch(name))

    def kept(self, name: str) -> int:
        """Bytes that the disk holds of the unfinished model `name`. Raises UsageError for an impossible name."""
        return files.used_bytes(files.partial_of(self.place(name)))

    def forget(self, name: str) -> None:
        """Deletes what is unfinished of the model `name`. Raises UsageError while somebody makes it, and where the store cannot be written."""
        with self.reserve(name) as folder, files.partial(folder) as kept:
            files.remove_folder(kept)

    def place(self, name: str) -> Path:
        """The folder of the model `name`, there or not. Raises UsageError for an impossible name."""
        if not _NAME.fullmatch(name) or len(name) > 100:
            raise UsageError(f"{name[:100]!r} is no name for a model.", hint="Names look like 7b, 0.5b:q4_0 or my-model.")
        return self.folder / name.replace(":", "@")

    def _open(self, folder: Path) -> Installed:
        name = folder.name.replace("@", ":")
        try:
            return Installed(name, folder, _read(folder, name))
        except UnsupportedModel:
            return Installed(name, folder, None, "made by a newer version")
        except BadFile:
            return Installed(name, folder, None, "its manifest is damaged")

    def _require_writable(self) -> None:
        if not paths.writable(self.folder):
            hint = "Check its permissions, or set QWEN2_LOCAL_HOME to another folder."
            raise UsageError(f"{self.folder} cannot be written.", hint=hint)


def _read(folder: Path, name: str) -> Manifest:
    hint = f"`qwen2-local rm {name}`, then get it again."
    try:
        manifest = Manifest.read(folder / _MANIFEST)
    except UnsupportedModel:
        raise
    except BadFile as error:
        raise BadFile(error.what, hint=hint) from error
    if manifest.name != name:
        raise BadFile(f"{folder / _MANIFEST} is of another model, {manifest.name[:100]!r}.", hint=hint)
    return manifest


def _is_model(folder: Path) -> bool:
    return not folder.name.startswith(".") and bool(_NAME.fullmatch(folder.name.replace("@", ":"))) and (folder / _MANIFEST).is_file()


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model found. label: to show; format: of its weights ("hf" has to be converted first); path: a GGUF file, or a folder.

    origin: where it was found. target: what an "hf" one is to be converted to, "" for the backend's own. manifest: of an installed one.
    """

    label: str
    format: Literal["gguf", "mlx", "hf"]
    path: Path
    origin: Literal["path", "installed", "built-in"] = "path"
    target: str = ""
    manifest: Manifest | None = None


GUIDE = "guide"
"""The name of the built-in model."""

_GGUF = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
_MLX = ("f32", "bf16", "f16", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit", "mixed_4_6", "mixed_3_6", "mixed_3_4", "mixed_2_6")

GUIDE_TARGETS = {**{level: f"gguf:{level}" for level in _GGUF}, **{f"mlx-{weights}": f"mlx:{weights}" for weights in _MLX}}
"""What "guide:LABEL" is converted to: every target of the converters."""


def resolve(name: str, store: Store | None = None) -> ModelRef:
    """The model that `name` means: `guide` (or `guide:q4_0`), an installed name, a path, in this order; what holds a separator is a path.

    Raises UnknownModel, which says what there is and how to get what is not; BadFile for a path that holds no model. Touches no network.
    """
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    looks_like_path = "/" in name or "\\" in name or name in (".", "..")
    if not name.strip() or "\0" in name:
        raise UnknownModel("the name of a model is missing.", hint="See `qwen2-local ls`.")
    if not looks_like_path:
        start, colon, level = name.lower().partition(":")
        if start == GUIDE:
            return _guide(level if colon else None)
        installed = _installed(name.lower(), store or Store())
        if installed:
            return installed
    try:
        if path.is_file():
            return _file_ref(path)
        if path.is_dir():
            return _folder_ref(path)
        if installed := _pulled(name, store or Store()):
            return installed
    except OSError as error:
        # A whole prompt in the place of the name is no file.
        if error.errno != errno.ENAMETOOLONG:
            raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check its permissions.") from error
    raise _unknown(name, looks_like_path, store or Store())


def guide_folder() -> Path:
    """The built-in model's checkpoint, in the package. Raises UnknownModel where the package was built without it."""
    folder = Path(__file__).parent / GUIDE
    if not (folder / "config.json").is_file():
        raise UnknownModel("This build has no built-in model.", hint="Install qwen2-local again, or give a path to a model.")
    return folder


def _guide(level: str | None) -> ModelRef:
    if level is None:
        return ModelRef(GUIDE, "hf", guide_folder(), "built-in")
    if level not in GUIDE_TARGETS:
        hint = f"The guide comes as {GUIDE}, or as {GUIDE}: and one of {', '.join(GUIDE_TARGETS)}."
        raise UnknownModel(f'there is no "{GUIDE}:{level[:60]}".', hint=hint)
    return ModelRef(f"{GUIDE}:{level}", "hf", guide_folder(), "built-in", GUIDE_TARGETS[level])


def _installed(name: str, store: Store) -> ModelRef | None:
    names = [installed.name for installed in store.list()]
    known = lookup(name)
    if name not in names:
        # "7b" finds "7b:q4_k_m", "7B-Instruct:Q4_0" finds "7b:q4_0"; "my-tune" finds "my-tune:q8_0".
        model, level = (known[0].name, known[1]) if known else (name, None)
        candidates = [one for one in names if one == (f"{model}:{level}" if level else model) or (not level and one.startswith(f"{model}:"))]
        if len(candidates) > 1:  # the original beside what was made of it
            candidates = [one for one in candidates if not one.endswith(":original")]
        if len(candidates) > 1:
            raise UnknownModel(f'"{name}" is installed as {_and(candidates)}.', hint="Name one of them.")
        name = candidates[0] if candidates else name
    if name not in names:
        return None
    found = store.get(name)
    assert found.manifest is not None
    return ModelRef(name, found.manifest.format, found.path, "installed", manifest=found.manifest)


def _pulled(id: str, store: Store) -> ModelRef | None:
    """The one model that is from the hub's repository `id` ("Qwen/Qwen2-0.5B-Instruct-GGUF"), if there is exactly one."""
    names = [one.name for one in store.list() if one.manifest and one.manifest.source.lower() == id.lower()]
    return _installed(names[0], store) if len(names) == 1 else None


def _file_ref(path: Path) -> ModelRef:
    if path.name.endswith((".safetensors", ".json")):
        raise BadFile(f"{path} is one file of a checkpoint.", hint=f"Give the folder: {path.parent}")
    with open_regular(path) as file:
        head = file.read(64)
    if not head.startswith(b"GGUF"):
        raise not_a("GGUF file", path, head)
    return ModelRef(path.name, "gguf", path)


def _folder_ref(folder: Path) -> ModelRef:
    label = folder.resolve().name
    if (folder / "config.json").exists():
        return ModelRef(label, "mlx" if is_mlx(folder) else "hf", folder)
    found = sorted(folder.glob("*.gguf"))
    if found and set(found) == set(split_parts(found[0])):
        return ModelRef(found[0].name, "gguf", found[0])
    if found:
        raise UnknownModel(f"{folder} holds {len(found)} GGUF files.", hint=f"Name one of them, {found[0]} say.")
    hint = "A model is a GGUF file, or a folder with config.json and .safetensors files."
    raise UnknownModel(f"{folder} holds no model.", hint=hint)


def _unknown(name: str, looks_like_path: bool, store: Store) -> UnknownModel:
    known = lookup(name)
    if known:
        model, level = known
        return UnknownModel(f"{model.title} is not installed.", hint=f"Get it with {how_to_get(model, level)}")
    if _HUB_ID.fullmatch(name):
        return UnknownModel(f"there is no file or folder {name[:200]}.", hint=f"If a hub has it: `qwen2-local pull {name}`.")
    if looks_like_path or name.endswith(".gguf"):
        return UnknownModel(f"there is no file or folder {name[:200]}.", hint="Check the name, or see `qwen2-local ls`.")
    here = [GUIDE, *(installed.name for installed in store.list())]
    close = suggestions(name, tuple(here))
    ask = f"Did you mean {_and(close, 'or')}?\n  " if close else ""
    sizes = _and([size.name for size in SIZES])
    return UnknownModel(
        f'no model is called "{name[:100]}".',
        hint=f"{ask}Qwen2 comes as {sizes}; installed here: {', '.join(here)}.\n  See `qwen2-local ls` and `qwen2-local pull --help`.",
    )


def _and(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
