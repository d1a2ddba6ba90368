"""Writes jobset_schema.json: what the CRD of JobSet says about the fields of tpu_scripts/jobset.yaml.

    git clone https://github.com/kubernetes-sigs/jobset
    git -C jobset log -1 --format='%H %cs' -- config/components/crd/bases    # the version below
    python tests/goldens/make_jobset_schema.py jobset/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml \
        "kubernetes-sigs/jobset 08dfbdf, 2026-08-18"

The CRD (800 kB) embeds the schema of pods. Of an object that jobset.yaml has, all field names stay;
what is below a field that it does not have is left out.
"""

import json
import sys
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
JOBSET = FOLDER.parents[1] / "tpu_scripts" / "jobset.yaml"
KEPT = "type enum format minimum maximum minLength maxLength pattern required maxItems minItems".split()
KEPT += ["x-kubernetes-int-or-string"]


def trimmed(schema: dict, used: object) -> dict:
    found = {key: schema[key] for key in KEPT if key in schema}
    if isinstance(used, dict) and "properties" in schema:
        fields = schema["properties"].items()
        found["properties"] = {
            name: trimmed(field, used[name]) for name, field in fields if name in used
        }
        found["unused"] = sorted(schema["properties"].keys() - used.keys())
    elif isinstance(used, dict):
        found["additionalProperties"] = trimmed(schema["additionalProperties"], None)
    elif isinstance(used, list):  # of all elements together
        merged = merge(used) if isinstance(used[0], dict) else used[0]
        found["items"] = trimmed(schema["items"], merged)
    return found


def merge(elements: list[dict]) -> dict:
    return {key: value for element in elements for key, value in element.items()}


def main() -> None:
    crd = yaml.safe_load(Path(sys.argv[1]).read_text())
    jobset = yaml.safe_load(JOBSET.read_text())
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2")
    schema = version["schema"]["openAPIV3Schema"]
    # Every object of Kubernetes has this; the CRD says it of embedded templates only.
    jobs = schema["properties"]["spec"]["properties"]["replicatedJobs"]
    schema["properties"]["metadata"] = jobs["items"]["properties"]["template"]["properties"][
        "metadata"
    ]
    text = json.dumps({"crd": sys.argv[2], "schema": trimmed(schema, jobset)}, indent=1)
    (FOLDER / "jobset_schema.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
