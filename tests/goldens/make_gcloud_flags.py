"""Writes gcloud_flags.json: the flags of the gcloud commands that tpu_scripts calls, by gcloud itself.

    python tests/goldens/make_gcloud_flags.py GOOGLE_CLOUD_SDK "578.0.0, 2026-08-04"

GOOGLE_CLOUD_SDK: an unpacked Cloud SDK. Its command line is built, nothing is called. Of a flag the
file says `switch` (takes no value), `value`, or the values it takes.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

SDK = Path(sys.argv[1])
QUEUED = "compute tpus queued-resources"
COMMANDS = [f"{QUEUED} {verb}" for verb in ("create", "describe", "delete", "list")]
COMMANDS += [f"alpha {QUEUED} create", "compute tpus tpu-vm ssh", "compute ssh"]
COMMANDS += ["compute resource-policies create workload-policy", "compute resource-policies delete"]
COMMANDS += [f"compute instance-templates {verb}" for verb in ("create", "delete")]
COMMANDS += [
    f"compute instance-groups managed {verb}" for verb in ("create", "delete", "list-instances")
]
COMMANDS += [f"container node-pools {verb}" for verb in ("create", "delete")]
COMMANDS += [f"storage {verb}" for verb in ("cp", "cat", "rm", "rsync", "buckets create")]
EVERYWHERE = ("--project", "--format", "--quiet")


def flags_of(arguments) -> dict[str, object]:
    found = {}
    for flag in arguments:
        for name in getattr(flag, "option_strings", ()):
            if name.startswith("--"):
                choices = sorted(
                    str(choice).lower().replace("_", "-") for choice in flag.choices or ()
                )
                found[name] = choices or ("switch" if flag.nargs == 0 else "value")
    return found


def main() -> None:
    os.environ |= {"CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1", "CLOUDSDK_CONFIG": "/nonexistent"}
    sys.path[:0] = [str(SDK / "lib"), str(SDK / "lib/third_party")]
    for version in ("v1", "alpha", "beta", "preview"):  # large, and not always in a copy of the SDK
        name = f"compute_{version}_messages"
        package = f"googlecloudsdk.generated_clients.apis.compute.{version}"
        if not (SDK / "lib" / package.replace(".", "/") / f"{name}.py").exists():
            sys.modules[f"{package}.{name}"] = MagicMock()
    from googlecloudsdk import gcloud_main
    from googlecloudsdk.calliope.base import Argument, ReleaseTrack
    from googlecloudsdk.command_lib.util.apis import arg_utils

    def without_messages(name, enum, *, custom_mappings=None, **_):
        """A flag whose values come from a message of the API: those that it names, or any."""
        values = {v[0] if isinstance(v, tuple) else v for v in (custom_mappings or {}).values()}
        return SimpleNamespace(choice_arg=Argument(name, choices=sorted(values) or None, help="x"))

    enums = arg_utils.ChoiceEnumMapper
    arg_utils.ChoiceEnumMapper = lambda name, enum, *options, **named: (
        without_messages if isinstance(enum, MagicMock) else enums
    )(name, enum, *options, **named)

    commands = {}
    for command in COMMANDS:
        top, (first, *rest) = (
            gcloud_main.CreateCLI([])._TopElement(),
            command.removeprefix("alpha ").split(),
        )
        track = ReleaseTrack.ALPHA if command.startswith("alpha ") else None
        element = top.LoadSubElement(first, release_track_override=track)
        for word in rest:
            element = element.LoadSubElement(word.replace("-", "_"))
        of_groups = flags_of(element.ai.ancestor_flag_args)
        of_groups = {k: v for k, v in of_groups.items() if k not in flags_of(top.ai.flag_args)}
        commands[command] = {"flags": of_groups | flags_of(element.ai.flag_args)}
    everywhere = {
        name: kind for name, kind in flags_of(top.ai.flag_args).items() if name in EVERYWHERE
    }
    tree = {"gcloud": sys.argv[2], "everywhere": everywhere, "commands": commands}
    Path(__file__).with_name("gcloud_flags.json").write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
