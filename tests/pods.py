"""A checkout with tpu_scripts before a fake gcloud, kubectl and worker: every call is recorded, the
bucket is a folder, and what ssh would run runs here.

Any step can be made to fail: `Pod.fail`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Of every test module about the scripts.
pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif(sys.platform != "linux", reason="the workers' side is for Linux"),
]
FOLDER = Path(__file__).parents[1] / "tpu_scripts"
SCRIPTS = ("create", "sync", "setup", "run", "logs", "status", "stop", "delete", "launch")
UV_VERSION = re.search(r"UV_VERSION=(\S+)", (FOLDER / "startup.sh").read_text())[1]
POD = "gs://my-bucket/dapo/pods/pod"
WHERE = ["--project=my-project", "--zone=us-east5-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]

# What each road makes of a slice of two hosts, and when all of it is there.
ROADS = {
    "queued-resource": dict(ROAD="queued-resource", ACCELERATOR_TYPE="v5p-16"),
    "mig": dict(ROAD="mig", ACCELERATOR_TYPE="v5p-16", TOPOLOGY="2x2x2"),
    "gke": dict(ROAD="gke", ACCELERATOR_TYPE="v5p-16", TOPOLOGY="2x2x2", CLUSTER="c"),
}
ACTIVE = {"queued-resource": "ACTIVE", "mig": "RUNNING+RUNNING", "gke": "ACTIVE"}
NETWORK = "ERROR: (gcloud) UNAVAILABLE: Failed to resolve 'googleapis.com'"
QUOTA = "ERROR: (gcloud) Quota 'TPUS_PER_TPU_FAMILY' exceeded. Limit: 0.0 in region us-east5."

# First in every fake: the failure of `Pod.fail`. A pattern #3 is the third call of gcloud or kubectl.
FAIL = r"""if IFS='|' read -r pattern status pass left message 2>/dev/null <"$FAKE/fail"; then
  call="PROGRAM $*"
  if [[ $pattern == \#* ]]; then call="#$(tr -cd '\036' <"$FAKE/calls" | wc -c)" pattern="$pattern "; call="$call "; fi
  if [[ $call != *"$pattern"* ]]; then :
  elif ((pass > 0)); then echo "$pattern|$status|$((pass - 1))|$left|$message" >"$FAKE/fail"
  elif ((left > 0)); then
    echo "$pattern|$status|0|$((left - 1))|$message" >"$FAKE/fail"
    echo "$message" >&2
    exit "$status"
  fi
fi
"""
# Calls are recorded as their words, each ended by \x1f, and the call by \x1e. (In bash: a Python
# would start 40 times slower.)
FAKES = {
    "gcloud": r"""printf -v call '%s\x1f' gcloud "$@"
printf '%s\x1e' "$call" >>"$FAKE/calls"
@FAIL@
missing() { printf 'ERROR: (gcloud.storage) The following URLs matched no objects or files:\n-gs://x\n' >&2; exit 1; }
words=() clobber=yes format=""
for a; do
  case $a in
    --no-clobber) clobber=no ;;
    --format=*) format=$a ;;
    --command=*) command=${a#*=} ;;
    --metadata-from-file=startup-script=*) cp "${a#*=*=}" "$FAKE/startup-script" ;;
    --*) ;;
    gs://*) words+=("$FAKE/bucket/${a#gs://}") ;;
    *) words+=("$a") ;;
  esac
done
set -- "${words[@]}"
if grep -qxF -- "${!#}" "$FAKE/broken" 2>/dev/null; then echo "ERROR: (gcloud) UNAVAILABLE: try later" >&2; exit 1; fi
all="$*"; key=${all/ create/}; key=${key/ delete/} key=${key/ workload-policy/}
case "$*" in
  *" create "*)
    if grep -qxF "$key" "$FAKE/made" 2>/dev/null; then echo "ERROR: (gcloud) The resource '$key' already exists" >&2; exit 1; fi
    echo "$key" >>"$FAKE/made" ;;
  *" delete "*)
    if ! grep -qxF "$key" "$FAKE/made" 2>/dev/null && [[ $2 == *-templates || $2 == *-policies ]]; then
      echo "ERROR: (gcloud) The resource '$key' was not found" >&2; exit 1
    fi
    grep -vxF "$key" "$FAKE/made" >"$FAKE/kept"; mv "$FAKE/kept" "$FAKE/made" ;;
esac
case "$1 $2 $4" in
  "storage cp "*)
    if [[ $clobber == yes || ! -e $4 ]]; then mkdir -p "$(dirname "$4")" && cp "$3" "$4"; fi ;;
  "storage cat "*) IFS= && cat $3 2>/dev/null || missing ;;
  "storage rm "*) rm "$3" 2>/dev/null || missing ;;
  "storage rsync "*) mkdir -p "$4" && cp -r "$3/." "$4" ;;
  *" describe")
    read -r state rest <"$FAKE/state"
    if [[ -n $rest ]]; then echo "$rest" >"$FAKE/state"; fi
    if [[ $state == NONE ]]; then echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource" >&2; exit 1; fi
    echo "$state" ;;
  *" list-instances")
    read -r state rest <"$FAKE/state"
    if [[ -n $rest ]]; then echo "$rest" >"$FAKE/state"; fi
    if [[ $state == NONE ]]; then echo "ERROR: (gcloud) The resource 'instanceGroupManagers/pod' was not found" >&2; exit 1; fi
    if [[ $format == *name* ]]; then printf 'pod-x\npod-y\n'
    elif [[ $state != EMPTY ]]; then printf 'NONE\t%s\n' ${state//+/ }; fi ;;
  "compute ssh "*) if [[ -e $FAKE/host ]]; then bash -c "$command"; fi ;;
  *" ssh") if [[ -e $FAKE/host ]]; then bash -c "$command"; fi ;;
esac""",
    "kubectl": r"""printf -v call '%s\x1f' kubectl "$@"
printf '%s\x1e' "$call" >>"$FAKE/calls"
@FAIL@
case $1 in
  apply) cp "${2#*=}" "$FAKE/jobset.yaml" ;;
  get)
    read -r state <"$FAKE/state"
    if [[ $2 == jobset && $state == NONE ]]; then echo 'Error from server (NotFound): jobsets "pod" not found' >&2; exit 1; fi
    if [[ $2 == jobset ]]; then echo "${state#ACTIVE}"; fi ;;
esac""",
    "sudo": 'exec "$@"',
    # Only the waits that a test is about take their time.
    "sleep": "if [[ $1 == 60 && -z ${FAKE_FAST:-} ]]; then exec /bin/sleep 60; else exec /bin/sleep 0.03; fi",
    # The metadata server, and the page with the installer of uv.
    "curl": """url=${@: -1}
if [[ $url == *metadata.google.internal* ]]; then cat "$FAKE/metadata/${url##*/}" 2>/dev/null || exit 22; exit 0; fi
echo "curl $*" >>"$FAKE/host_calls"
@FAIL@
while [[ $1 != -o ]]; do shift; done
echo 'mkdir -p "$UV_INSTALL_DIR" && cp "$FAKE/uv" "$UV_INSTALL_DIR/uv"' >"$2" """,
    "tar": '@FAIL@\nexec /bin/tar "$@"',
}
UV = """if [[ $1 == --version ]]; then echo "uv $UV_VERSION"; exit; fi
echo "uv $*" >>"$FAKE/host_calls"
@FAIL@
if [[ -e $FAKE/uv_fails ]]; then exit 1; fi
if [[ $1 == venv ]]; then mkdir -p venv/bin && cp "$FAKE/python" venv/bin/python; fi"""
# The trained program: takes its exit statuses, one a start, from a file; `wait` leaves with 143 on
# SIGTERM, `hang` does not.
PYTHON = r"""printf -v run '%s\x1f' "$PWD" "$JAX_COMPILATION_CACHE_DIR" "$@"
printf '%s\x1e' "$run" >>"$FAKE/runs"
echo training
read -r status rest <"$FAKE/statuses"
echo "$rest" >"$FAKE/statuses"
case $status in
  wait)
    trap 'trap "touch $FAKE/twice" TERM; kill $!; for i in 1 2 3 4; do /bin/sleep 0.05; done; exit 143' TERM
    /bin/sleep 30 &
    touch "$FAKE/ready"
    wait ;;
  hang) trap '' TERM; touch "$FAKE/ready"; /bin/sleep 30 ;;
  *) exit "$status" ;;
esac"""


def executable(path: Path, text: str) -> None:
    fail = FAIL.replace("PROGRAM", path.name)
    path.write_text(f"#!/bin/bash\n{text.replace('@FAIL@', fail)}\n")
    path.chmod(0o755)


def records(file: Path) -> list[list[str]]:
    text = file.read_text() if file.exists() else ""
    return [record.split("\x1f")[:-1] for record in text.split("\x1e")[:-1]]


# Settings come from the file alone; git from no configuration; nothing here is on a TPU.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "MEGASCALE_", "TPU_"))}
CLEAN |= {
    f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}
CLEAN |= {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_COMMITTER_DATE": "1700000000 +0000",
}


class Pod:
    """A checkout with the scripts, a settings file, and the fakes first on PATH."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.repo, self.fake = tmp, tmp / "my repo", tmp / "fake"
        self.bucket = self.fake / "bucket/my-bucket/dapo"
        self.home = tmp / "host"
        self.env = CLEAN | {
            "PATH": f"{tmp / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "TMPDIR": str(tmp),
        }
        self.env["UV_VERSION"] = UV_VERSION

    def make(self) -> None:
        for folder in (
            self.repo / "configs",
            self.fake / "bucket",
            self.fake / "metadata",
            self.tmp / "bin",
        ):
            folder.mkdir(parents=True)
        shutil.copytree(FOLDER, self.repo / "tpu_scripts")
        (self.repo / "configs/a.yaml").write_text("a: 1\n")
        (self.repo / "pyproject.toml").write_text("[project]\n")
        for name, text in FAKES.items():
            executable(self.tmp / "bin" / name, text)
        executable(self.fake / "uv", UV)
        executable(self.fake / "python", PYTHON)
        self.git("init", "-q", "--template=")
        self.commit()
        self.state("NONE")
        self.settings()

    def git(self, *args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=self.repo, env=self.env, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self) -> None:
        self.git("add", ".")
        self.git("commit", "-q", "-m", "x")

    def settings(self, remove: str = "", **changed: str) -> None:
        """Writes the settings file; values are bash source."""
        values = {
            "PROJECT": "my-project",
            "ZONE": "us-east5-a",
            "NAME": "pod",
            "BUCKET": "gs://my-bucket/dapo",
            "CONFIG": "configs/a.yaml",
        }
        values |= {
            "ACCELERATOR_TYPE": "v5p-256",
            "RUN": "r1",
            "WORKER_HOME": str(self.home),
            "RESTART_PAUSE": "0",
        } | changed
        (self.tmp / "my.env").write_text(
            "".join(f"{k}={v}\n" for k, v in values.items() if k != remove)
        )

    def state(self, *states: str) -> None:
        (self.fake / "state").write_text(" ".join(states))

    def fail(self, step: str, message: str, *, status=1, passed=0, times=10**6) -> None:
        """From now on calls that contain `step` fail, so many times, after `passed` that do not."""
        (self.fake / "fail").write_text(f"{step}|{status}|{passed}|{times}|{message}\n")

    def mend(self) -> None:
        (self.fake / "fail").unlink(missing_ok=True)

    def clear(self) -> None:
        """A cloud with nothing in it, and no calls."""
        shutil.rmtree(self.fake / "bucket/my-bucket", ignore_errors=True)
        for name in ("made", "calls", "startup-script", "jobset.yaml", "fail"):
            (self.fake / name).unlink(missing_ok=True)

    def __call__(self, script: str, *args: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
        command = [
            "bash",
            str(self.repo / f"tpu_scripts/{script}.sh"),
            f"--env={self.tmp / 'my.env'}",
            *args,
        ]
        done = subprocess.run(
            command, env=self.env, cwd=self.tmp, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == rc, (done.returncode, done.stdout, done.stderr)
        assert not list(self.tmp.rglob("pwned"))
        return done

    def calls(self) -> list[list[str]]:
        """The recorded calls of gcloud since last asked; temporary folders are named TMP."""
        calls = records(self.fake / "calls")
        (self.fake / "calls").unlink(missing_ok=True)
        return [
            [re.sub(rf"{re.escape(str(self.tmp))}/tmp\.\w+", "TMP", word) for word in call]
            for call in calls
        ]

    def runs(self) -> list[list[str]]:
        """Folder, compile cache and arguments of every start of the program."""
        return records(self.fake / "runs")

    def statuses(self, *statuses: object) -> None:
        (self.fake / "statuses").write_text(" ".join(map(str, statuses)))

    def host(self) -> None:
        """From now on ssh runs its command here, as the one worker."""
        (self.fake / "host").touch()
        self.state("ACTIVE")

    def worker(self, *mode: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
        """The uploaded worker script, as a slice that starts it."""
        command = ["bash", str(self.bucket / "pods/pod/worker.sh"), *mode]
        done = subprocess.run(
            command, env=self.env, cwd=self.tmp, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == rc, (done.stdout, done.stderr, self.log())
        return done

    def log(self) -> str:
        return "".join(file.read_text() for file in sorted((self.home / "logs").glob("*.log")))

    def finished(self) -> str:
        return (self.bucket / "pods/pod/finished").read_text()

    def wait_for(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    Pod(folder).make()
    return folder


@pytest.fixture
def pod(template, tmp_path):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    pod = Pod(tmp_path)
    pod.settings()
    yield pod
    if (pod.home / "pid").exists():  # a test that failed leaves no process
        (pod.home / "stopping").touch()
        os.killpg(int((pod.home / "pid").read_text()), signal.SIGKILL)
