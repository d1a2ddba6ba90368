"""What the scripts ask of others exists there: fields of the JobSet in its CRD, flags and values in
gcloud. Both were extracted from published files, by scripts in goldens/.
"""

import json
import re
import shlex

import pytest
import yaml
from pods import (
    ACTIVE,
    FOLDER,
    ROADS,
    SCRIPTS,
    pytestmark,  # noqa: F401
)
from runs import TESTS

GOLDENS = TESTS / "goldens"
CRD = json.loads((GOLDENS / "jobset_schema.json").read_text())["schema"]
GCLOUD = json.loads((GOLDENS / "gcloud_flags.json").read_text())

# ---- JobSet and its pods -----------------------------------------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def faults(value, schema: dict, at: str = "") -> list[str]:
    """As `kubectl apply --validate=strict`: a field that the schema does not have is one too."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{at}: {value!r}"]
    kind = TYPES[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return [f"{at}: {value!r} is not of type {schema['type']}"]
    found = [f"{at}: {name} is missing" for name in schema.get("required", ()) if name not in value]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{at}: {value} is below {schema['minimum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{at}: {value!r} does not match {schema['pattern']}")
    if len(value) > schema.get("maxItems", 10**9) if kind is list else False:
        found.append(f"{at}: too long")
    if kind is list:
        for index, element in enumerate(value):
            found += faults(element, schema["items"], f"{at}[{index}]")
    if kind is dict:
        fields = schema.get("properties", {})
        for name, element in value.items():
            below = fields.get(name, schema.get("additionalProperties"))
            if name in schema.get("unused", ()):
                found.append(f"{at}.{name}: run goldens/make_jobset_schema.py, it is new here")
            elif below is None:
                found.append(f"{at}.{name}: no such field")
            else:
                found += faults(element, below, f"{at}.{name}")
    return found


@pytest.fixture
def jobset():
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def test_the_jobset_is_of_its_crd(jobset):
    assert faults(jobset, CRD) == []


@pytest.mark.parametrize("capacity", ["on-demand", "spot", "reserved", "flex-start"])
@pytest.mark.parametrize("tpu", ["v5p-16 2x2x2", "tpu7x-128 4x4x4", "v6e-16 4x4"])
def test_what_is_applied_is_of_the_crd(pod, capacity, tpu):
    accelerator, topology = tpu.split()
    settings = ROADS["gke"] | {"ACCELERATOR_TYPE": accelerator, "TOPOLOGY": topology}
    settings |= {"CAPACITY": capacity, "QUEUE": "team", "SLICES": "2"}
    pod.settings(**settings, MAX_RUN_DURATION="7d" if capacity == "flex-start" else "")
    pod("launch")
    applied = yaml.safe_load((pod.fake / "jobset.yaml").read_text())
    assert faults(applied, CRD) == []
    # pkg/controller/constants of Kueue (August 2026); a label's value has at most 63 characters.
    assert applied["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def change(tree, path: str, value):
    *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parts:
        tree = tree[part]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


JOB = "spec.replicatedJobs.0.template.spec"
POD_SPEC = f"{JOB}.template.spec"


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("spec.failurePolicy.maxRestart", 1, "maxRestart: no such field"),
        ("spec.failurePolicy.rules.0.name", None, "name is missing"),
        ("spec.failurePolicy.rules.0.action", "Fail", "is none of"),
        ("spec.failurePolicy.maxRestarts", "20", "is not of type integer"),
        ("metadata.label", {}, "label: no such field"),
        ("metadata.labels.app", 1, "is not of type string"),
        (f"{JOB}.backoffLimits", 0, "no such field"),
        (f"{JOB}.podFailurePolicy.rules.0.onExitCodes.operator", None, "operator is missing"),
        (f"{POD_SPEC}.terminationGracePeriod", 600, "no such field"),
        (f"{POD_SPEC}.nodeSelectors", {}, "no such field"),
        (f"{POD_SPEC}.containers.0.resource", {}, "no such field"),
        (f"{POD_SPEC}.containers.0.ports.0.port", 80, "no such field"),
        (f"{POD_SPEC}.containers.0.env.0.key", "A", "no such field"),
        (f"{POD_SPEC}.containers.0.command", "bash", "is not of type array"),
    ],
)
def test_a_wrong_field_is_found(jobset, path, value, said):
    change(jobset, path, value)
    assert len(found := faults(jobset, CRD)) == 1 and said in found[0]


# ---- gcloud ------------------------------------------------------------------------------------------------------------

CAPACITIES = [
    dict(CAPACITY="on-demand"),
    dict(CAPACITY="spot"),
    dict(CAPACITY="reserved"),
    dict(CAPACITY="flex-start", MAX_RUN_DURATION="7d"),
]


def unknown(call: list[str]) -> list[str]:
    """Flags and values of a gcloud call that its command does not have."""
    words = call[1:]
    path = next(
        c
        for c in sorted(GCLOUD["commands"], reverse=True)
        if words[: c.count(" ") + 1] == c.split()
    )
    flags = GCLOUD["commands"][path]["flags"] | GCLOUD["everywhere"]
    found = []
    for word in words:
        flag, given, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        kind = flags.get(flag)
        if flag not in flags or (kind == "switch") == bool(given):
            found.append(word)
        elif isinstance(kind, list) and value.lower().replace("_", "-") not in kind:
            found.append(word)
    return found


def printed(pod, script, settings, state) -> list[list[str]]:
    pod.settings(**settings)
    pod.state(state)
    lines = pod(script, "--dry-run").stdout.splitlines()
    return [call for call in map(shlex.split, lines) if call[0] == "gcloud"]


@pytest.mark.parametrize("road", ROADS)
def test_every_flag_and_value_is_gclouds(pod, road):
    seen = set()
    settings = [ROADS[road] | capacity for capacity in CAPACITIES]
    if road == "queued-resource":
        settings += [settings[0] | {"SLICES": "2", "VALID_UNTIL": "6h"}]
    if road == "gke":
        settings += [settings[0] | {"ACCELERATOR_TYPE": "tpu7x-128", "TOPOLOGY": "4x4x4"}]
    for setting in settings:
        for script in SCRIPTS:
            if (script, road) == ("setup", "gke"):
                continue
            state = "NONE" if script in ("create", "launch") else ACTIVE[road]
            for call in printed(pod, script, setting, state):
                assert unknown(call) == []
                seen.add(" ".join(call[1:4]))
    assert len(seen) > 3


def test_calls_of_the_worker_are_gclouds():
    """`${delete[@]}` and the like are spelt out there."""
    text = (FOLDER / "startup.sh").read_text()
    calls = re.findall(r"(gcloud storage \w+(?: --[\w-]+)*)", text)
    calls += ["gcloud " + call for call in re.findall(r"delete=\((.*?)\)", text)]
    assert len(calls) >= 7
    for call in calls:
        assert unknown(shlex.split(call)) == []


@pytest.mark.parametrize(
    "call",
    [
        "compute tpus queued-resources create q --node-ids=q",
        "compute tpus queued-resources create q --provisioning-model=flex-start",  # alpha only
        "compute tpus queued-resources create q --spot=yes",
        "compute tpus queued-resources create q --node-id",
        "compute instance-templates create t --provisioning-model=FLEX",
        "compute instance-groups managed create g --target-size-policy-mode=all",
        "container node-pools create n --flexstart",
        "storage cp a b --noclobber",
    ],
)
def test_a_misspelt_flag_is_found(call):
    assert len(unknown(["gcloud", *call.split()])) == 1
