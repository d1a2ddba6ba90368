"""Problems as a prepared tensorflow-datasets folder (array_record), without TensorFlow."""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builders.adhoc_builder import AdhocBuilder

from dapo_jax.config import ArithmeticConfig, ColumnsConfig
from dapo_jax.data.files import MAX_ROW_BYTES, choose_split
from dapo_jax.data.problems import load_problems
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.runtime.files import Folder, as_path, check_url, errors_as, is_bucket, upload
from dapo_jax.types import InputError, Problem, one_line

_BATCH = 64  # records
_VERSION, _INFO = "1.0.0", "dataset_info.json"


def _registered_feature(cls: Any, name: str) -> Any:
    """The feature class of a name. tfds itself would import any module that features.json names."""
    if name not in cls._registered_features:
        raise ValueError(f"features.json: {name!r} is no feature of tensorflow-datasets")
    return cls._registered_features[name]


tfds.features.FeatureConnector.cls_from_name = classmethod(_registered_feature)


class _Builder(AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
    url_infos = None  # no downloads: looking for checksums needs importlib_resources

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
        return self._split_datasets  # its parent's needs TensorFlow


def _example(p: Problem) -> dict[str, Any]:
    """A record of a problem. A chat prompt is in `turns`, and `prompt` is empty."""
    text, turns = (p.prompt, []) if isinstance(p.prompt, str) else ("", map(vars, p.prompt))
    row = {"id": p.id, "prompt": text, "turns": [*turns], "answer": p.answer}
    return row | {"solution": p.solution or ""}


def prepare(
    source: str,
    folder: str,
    *,
    test: str | None = None,
    name: str = "problems",
    columns: ColumnsConfig = AS_USUAL,
    info: Callable[[str], Any] = lambda summary: None,
) -> Folder:
    """Writes the distinct problems of a data set, those of `test` as a split of that name, and
    returns the folder: `folder`/`name`/1.0.0, local or in a bucket.

    info: gets the summary of each source. Raises InputError if a source is unusable, or the folder
    exists or cannot be written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(f"{name!r}: no name of a data set; use a-z, 0-9 and _, a letter first")
    if is_bucket(folder):
        check_url(folder, "a folder to write")
    splits, summaries = {}, []
    for split, path in {"train": source, "test": test}.items():
        if path is not None:
            how: Any = {"columns": columns, "heldout": split == "test"}
            problems, report = load_problems(path, ArithmeticConfig(), **how)
            splits[split] = enumerate(map(_example, problems))
            summaries.append(report.summary())
            info(summaries[-1])
    target = as_path(folder) / name / _VERSION
    fix = 'choose another folder; for a bucket, pip install "etils[epath-gcs]" and give access'
    with errors_as(InputError, target, "cannot be written", fix):
        if (target / _INFO).exists():
            taken = "already holds a prepared data set; choose another folder"
            raise InputError(f"{target}: {taken}")
        with tempfile.TemporaryDirectory() as temporary:
            upload(_write(name, splits, "\n".join(summaries), temporary), target, last=_INFO)
    return target


def _write(name: str, splits: Mapping[str, Any], about: str, folder: str) -> Path:
    tfds.disable_progress_bar()
    text = tfds.features.Text()
    turns = tfds.features.Sequence({"role": text, "content": text})
    columns = {"id": text, "prompt": text, "turns": turns, "answer": text, "solution": text}
    builder = _Builder(
        name=name,
        version=_VERSION,
        features=tfds.features.FeaturesDict(columns),
        split_datasets=splits,
        description=about,
        data_dir=folder,
        file_format="array_record",
        disable_shuffling=True,
    )
    no_gcs = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=f"{folder}/none", download_config=no_gcs)
    return Path(builder.data_dir)


def records(folder: str, heldout: bool) -> Callable[[None], tuple[int, list[Any]] | None]:
    """In the process of `files.py`: reads the next record of a prepared folder; None at the end.
    InputError if the folder is damaged, or has no such split."""

    def pieces() -> Iterator[tuple[int, list[Any]]]:
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            builder = tfds.builder_from_directory(folder)
            split = choose_split(list(builder.info.splits), heldout)
            raw = builder.as_data_source(split=split, deserialize_method=raw_bytes)
            for start in range(0, len(raw), _BATCH):
                batch = raw.__getitems__(list(range(start, min(start + _BATCH, len(raw)))))
                if not all(batch):  # a shortened file may read as empty records, without an error
                    raise ValueError(f"empty record {start + batch.index(b'') + 1}")
                size = len(batch) if sum(map(len, batch)) <= MAX_ROW_BYTES else 1
                for part in (batch[n : n + size] for n in range(0, len(batch), size)):
                    rows = [_row(builder.info.features, record) for record in part]
                    yield sum(map(len, part)), rows
        except (InputError, MemoryError):
            raise
        except Exception as e:  # tfds, protobuf and array_record raise many kinds on damaged files
            what = f"not a readable data set ({one_line(e)})"
            raise InputError(f"{what}; prepare it again as array_record") from None

    found = pieces()
    return lambda order: next(found, None)


def _row(features: Any, record: bytes) -> dict[str, Any] | str:
    if len(record) > MAX_ROW_BYTES:
        return f"longer than {MAX_ROW_BYTES >> 20} MB"
    row = {name: _plain(v) for name, v in features.deserialize_example_np(record).items()}
    return row | {"prompt": row["turns"]} if row.get("turns") else row


def _plain(value: Any) -> Any:
    """Arrays and bytes as lists and text; a dict of lists of roles and contents as chat turns."""
    match value:
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case {"role": np.ndarray() | list() as roles, "content": contents}:
            pairs = zip(_plain(roles), _plain(contents), strict=True)
            return [{"role": role, "content": content} for role, content in pairs]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case bytes():  # lone surrogates stand for bytes that are not UTF-8: a counted skip
            return value.decode("utf-8", "surrogateescape")
    return value
