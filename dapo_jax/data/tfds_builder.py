"""Problems as a prepared tensorflow-datasets folder (array_record), written and read by random access without TensorFlow."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dapo_jax.config import ArithmeticConfig
from dapo_jax.data.problems import LoadReport, collect_problems, load_problems, problem_from_row
from dapo_jax.types import InputError, Problem

_BATCH = 1024  # records


def _registered_feature(cls: Any, name: str) -> Any:
    """The feature class of that name. tensorflow-datasets' own way imports whatever module a data set's features.json names."""
    if name not in cls._registered_features:
        raise ValueError(f"features.json names {name!r}, which is no feature of tensorflow-datasets")
    return cls._registered_features[name]


tfds.features.FeatureConnector.cls_from_name = classmethod(_registered_feature)


class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Distinct problems in their order, one split `train`. A chat prompt is in `turns`, and `prompt` is then empty."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for checksums would need importlib_resources, which may not be installed

    def __init__(self, problems: list[Problem], **kwargs: Any):
        self._problems = problems
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = {"id": text, "prompt": text, "turns": turns, "answer": text, "solution": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, p in enumerate(self._problems):
            plain = isinstance(p.prompt, str)
            turns = [] if isinstance(p.prompt, str) else [{"role": t.role, "content": t.content} for t in p.prompt]
            yield (
                number,
                {"id": p.id, "prompt": p.prompt if plain else "", "turns": turns, "answer": p.answer, "solution": p.solution or ""},
            )


def prepare(source: str, folder: str) -> Path:
    """Writes the distinct problems of a JSON-lines or Parquet file below `folder`; returns the prepared folder, a `data.train`.

    Raises InputError if the source is unusable, or if `folder` already holds prepared problems or cannot be written.
    """
    problems, _ = load_problems(source, ArithmeticConfig())
    try:
        builder = Problems(problems, data_dir=folder, file_format="array_record")
        if Path(builder.data_dir).exists():
            raise InputError(f"{builder.data_dir}: already holds a prepared data set; remove it or choose another folder")
        tfds.disable_progress_bar()
        with tempfile.TemporaryDirectory() as nothing_to_download:
            builder.download_and_prepare(
                download_dir=nothing_to_download, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except OSError as e:
        raise InputError(f"{folder}: cannot be written ({e.strerror or e}); choose another folder") from None
    return Path(builder.data_dir)


def read_problems(folder: str, *, heldout: bool = False) -> tuple[list[Problem], LoadReport]:
    """Distinct problems of a folder prepared by tensorflow-datasets, and what became of its records.

    Reads the only split, or where there are several `train`, and for `heldout` problems `test` or `validation`.
    Raises InputError if the folder is not a prepared data set, is corrupt, or holds no usable problem.
    """
    if not Path(folder, "dataset_info.json").is_file():
        raise InputError(f"{folder}: holds no dataset_info.json; give a folder prepared by tensorflow-datasets")
    try:
        builder = tfds.builder_from_directory(folder)
        split = _split(folder, list(builder.info.splits), heldout)
        raw = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except InputError:
        raise
    except Exception as e:  # the many kinds that tensorflow-datasets, protobuf and array_record raise on damaged files
        raise _corrupt(folder, e) from None
    return collect_problems(folder, _rows(folder, builder.info.features, raw), problem_from_row)


def _split(folder: str, splits: list[str], heldout: bool) -> str:
    wanted = ("test", "validation") if heldout else ("train",)
    found = splits if len(splits) == 1 else [name for name in wanted if name in splits]
    if not found:
        raise InputError(f"{folder}: has none of the splits {', '.join(wanted)} among {', '.join(splits)}; prepare one of them alone")
    return found[0]


def _rows(folder: str, features: Any, raw: Any) -> Iterator[tuple[int, Any]]:
    """Numbered records as rows of plain Python objects, a batch in memory at a time."""
    for start in range(0, len(raw), _BATCH):
        try:
            records = raw.__getitems__(list(range(start, min(start + _BATCH, len(raw)))))
            if not all(records):  # a file that was cut short may read as empty records, without an error
                raise ValueError(f"empty record {start + records.index(b'') + 1}")
            rows = [_row(features.deserialize_example_np(record)) for record in records]
        except Exception as e:
            raise _corrupt(folder, e) from None
        yield from enumerate(rows, start + 1)


def _corrupt(folder: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{folder}: not a readable data set ({reason}); prepare it again as array_record")


def _row(example: dict[str, Any]) -> dict[str, Any]:
    row = {name: _plain(value) for name, value in example.items()}
    for name in ("turns", "prompt"):
        value = row.get(name)
        if isinstance(value, dict):  # tensorflow-datasets makes a sequence of dicts a dict of sequences
            pairs = zip(value.get("role", []), value.get("content", []), strict=True)
            row["prompt"] = [{"role": role, "content": content} for role, content in pairs] or row["prompt"]
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # lone surrogates stand for undecodable bytes: a counted skip
    return value
