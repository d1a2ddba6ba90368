"""Problems as a prepared tensorflow-datasets folder (array_record), written and read by random
access without TensorFlow.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dapo_jax.config import ArithmeticConfig, ColumnsConfig
from dapo_jax.data.files import MAX_ROW_BYTES, choose_split
from dapo_jax.data.problems import Watch, load_problems
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.runtime.files import Folder, as_path, check_url, errors_as, is_bucket, upload
from dapo_jax.types import InputError, Problem

_BATCH = 64  # records


def _registered_feature(cls: Any, name: str) -> Any:
    """The feature class of that name. tensorflow-datasets' own way imports whatever module a data
    set's features.json names.
    """
    if name not in cls._registered_features:
        raise ValueError(
            f"features.json names {name!r}, which is no feature of tensorflow-datasets"
        )
    return cls._registered_features[name]


tfds.features.FeatureConnector.cls_from_name = classmethod(_registered_feature)


class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Distinct problems in their order, by split.

    A chat prompt is in `turns`, and `prompt` is then empty.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for checksums would need importlib_resources, which may not be installed

    def __init__(
        self, name: str, splits: Mapping[str, list[Problem]], description: str, **kwargs: Any
    ):
        self.name, self._splits, self._description = name, splits, description
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = {"id": text, "prompt": text, "turns": turns, "answer": text, "solution": text}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {
            split: self._generate_examples(problems) for split, problems in self._splits.items()
        }

    def _generate_examples(self, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, p in enumerate(problems):
            plain = isinstance(p.prompt, str)
            turns = (
                []
                if isinstance(p.prompt, str)
                else [{"role": t.role, "content": t.content} for t in p.prompt]
            )
            yield (
                number,
                {
                    "id": p.id,
                    "prompt": p.prompt if plain else "",
                    "turns": turns,
                    "answer": p.answer,
                    "solution": p.solution or "",
                },
            )


def prepare(
    source: str,
    folder: str,
    *,
    test: str | None = None,
    name: str = "problems",
    columns: ColumnsConfig = AS_USUAL,
    watch: Watch | None = None,
    info: Callable[[str], Any] | None = None,
) -> Folder:
    """Writes the distinct problems of a data set to `folder`/`name`/1.0.0, as split `train`; those
    of `test`, another one, as `test`.

    Returns the prepared folder, which data.train and eval.sets may name; `folder` may be in a
    bucket. info: is told what became of the rows of each source, as dataset_info.json is. Raises
    InputError if a source is unusable, or if `folder` already holds such problems or cannot be
    written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(
            f"{name!r}: cannot name a data set; use small letters, digits and '_', a letter first"
        )
    if is_bucket(folder):
        check_url(folder, "a folder to write")
    splits, said = {}, []
    for split, path in {"train": source, "test": test}.items():
        if path is not None:
            splits[split], report = load_problems(
                path, ArithmeticConfig(), columns=columns, heldout=split == "test", watch=watch
            )
            said.append(report.summary())
            if info is not None:
                info(said[-1])
    if not is_bucket(folder):
        return _write(name, splits, "\n".join(said), folder)
    with tempfile.TemporaryDirectory() as temporary:
        prepared = _write(name, splits, "\n".join(said), temporary)
        target = as_path(folder) / prepared.relative_to(temporary).as_posix()
        fix = 'pip install "dapo_jax[tpu]", and give this machine access to the bucket'
        with errors_as(InputError, target, "cannot be written", fix):
            if (target / "dataset_info.json").exists():
                taken = "already holds a prepared data set; remove it or choose another folder"
                raise InputError(f"{target}: {taken}")
            upload(prepared, target, last="dataset_info.json")
    return target


def _write(name: str, splits: Mapping[str, list[Problem]], description: str, folder: str) -> Path:
    try:
        builder = Problems(name, splits, description, data_dir=folder, file_format="array_record")
        if Path(builder.data_dir).exists():
            raise InputError(
                f"{builder.data_dir}: already holds a prepared data set; remove it or choose another folder"
            )
        tfds.disable_progress_bar()
        with (
            tempfile.TemporaryDirectory() as nothing_to_download,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.download_and_prepare(
                download_dir=nothing_to_download,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except OSError as e:
        raise InputError(
            f"{folder}: cannot be written ({e.strerror or e}); choose another folder"
        ) from None
    return Path(builder.data_dir)


def records(orders: Iterator[Any]) -> Iterator[Any]:
    """The records of a prepared folder, in the process of `files.prepared_rows`: [source, folder,
    heldout] → [bytes, rows].

    Raises InputError if the folder is damaged, or has no such split.
    """
    yield
    source, folder, heldout = next(orders)
    try:
        builder = tfds.builder_from_directory(folder)
        split = choose_split(source, list(builder.info.splits), heldout)
        raw = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        for start in range(0, len(raw), _BATCH):
            batch = raw.__getitems__(list(range(start, min(start + _BATCH, len(raw)))))
            if not all(
                batch
            ):  # a file that was cut short may read as empty records, without an error
                raise ValueError(f"empty record {start + batch.index(b'') + 1}")
            for record in batch:
                yield [len(record), [_row(builder.info.features, record)]]
    except (InputError, MemoryError):
        raise
    except Exception as e:  # the many kinds that tensorflow-datasets, protobuf and array_record raise on damaged files
        raise _corrupt(source, e) from None


def _corrupt(source: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(
        f"{source}: not a readable data set ({reason}); prepare it again as array_record"
    )


def _row(features: Any, record: bytes) -> dict[str, Any] | str:
    if len(record) > MAX_ROW_BYTES:
        return f"longer than {MAX_ROW_BYTES >> 20} MB"
    row = {name: _plain(value) for name, value in features.deserialize_example_np(record).items()}
    return row | {"prompt": row["turns"]} if row.get("turns") else row


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        fields = {key: _plain(item) for key, item in value.items()}
        role, content = fields.get("role"), fields.get("content")
        if isinstance(role, list) and isinstance(
            content, list
        ):  # tensorflow-datasets makes a sequence of dicts a dict of sequences
            return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]
        return fields
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(
            "utf-8", "surrogateescape"
        )  # lone surrogates stand for undecodable bytes: a counted skip
    return value
