"""A pod that is started from the rendered manifest as the kubelet and a container runtime would start it.

tests/deploy/test_pod.py runs this file in mount, network and PID namespaces of its own. The image is the one that
deploy/with-image has built, or is assembled from this machine's system, Python and package. Seccomp and cgroups, which
only a runtime has, are missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import lorarep_server
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lorarep.v1 import generation_pb2, generation_pb2_grpc

from tests.deploy.test_manifests import DEMO, DEPLOY, ROOT, Objects, render
from tests.support.callers import NOT_SERVING, SERVING, request, stream_tokens, stream_until_refused
from tests.support.hub_faults import FaultyHub
from tests.support.image import Image, built
from tests.support.servers import wait_for

ADDRESS = "127.0.0.2"
"""The pod's address. A server that listens only on 127.0.0.1 is not reachable here."""
TOKEN = "a-token-of-this-test"
CALLERS = 8
NEW_TOKENS = 200
HAS_USERS = int(Path("/proc/self/uid_map").read_text().split()[2]) > 1
"""Whether this user namespace has several users. Otherwise the pod's user is mapped to the current one."""


class Pod:
    """A pod of one container, with volumes in folders of this machine."""

    def __init__(self, objects: Objects, folder: Path, claims: Mapping[str, Path], secrets: Mapping[str, str]) -> None:
        """
        Args:
            objects: the rendered manifest.
            folder: the folder of volumes and root.
            claims: the content of each persistent volume claim, by name.
            secrets: the value of the only key of each Secret, by name.
        """
        self._objects, self._claims, self._secrets = objects, claims, secrets
        stateful = objects["StatefulSet", "lorarep"]["spec"]
        self.spec = stateful["template"]["spec"]
        (self.container,) = self.spec["containers"]
        self.image = Image()
        self.volumes = {volume["name"]: self._volume(folder, volume) for volume in self.spec["volumes"]}
        for claim in stateful["volumeClaimTemplates"]:
            self.volumes[claim["metadata"]["name"]] = self._given(folder / claim["metadata"]["name"], 0o2775)
        self._root = folder / "root"
        self._make_root()

    def _given(self, path: Path, mode: int) -> Path:
        """Gives a file or a folder, which is made if needed, to the pod's group."""
        if not path.exists():
            path.mkdir()
        if HAS_USERS:
            os.chown(path, 0, self.spec["securityContext"]["fsGroup"])
        path.chmod(mode)
        return path

    def _volume(self, folder: Path, volume: Mapping[str, Any]) -> Path:
        path = folder / volume["name"]
        match volume:
            case {"emptyDir": _}:
                return self._given(path, 0o2777)
            case {"persistentVolumeClaim": {"claimName": name}}:
                return self._claims[name]
            case {"configMap": {"name": name, **source}}:
                contents = self._objects["ConfigMap", name]["data"]
            case {"secret": {"secretName": name, **source}}:
                contents = {name.rpartition("-")[2]: self._secrets[name]}
        # As the kubelet does: links through `..data`, so that all files change at once.
        data = self._given(self._given(path, 0o2755) / "..2026", 0o2755)
        (path / "..data").symlink_to(data.name)
        for name, content in contents.items():
            (data / name).write_text(content)
            self._given(data / name, source.get("defaultMode", 0o644))
            (path / name).symlink_to(f"..data/{name}")
        return path

    def _make_root(self) -> None:
        self._root.mkdir()
        if (image := built()) is None:
            self._make_root_of_this_machine()
        else:
            mount("--bind", image / "root", self._root)
        self._bind(Path("/sys"), Path("/sys"))
        for device in ("null", "zero", "full", "random", "urandom"):
            self._bind(Path("/dev", device), Path("/dev", device), writable=True)
        self._file("/dev/shm").mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", "size=64m,mode=1777", "shm", self._root / "dev/shm")
        self._file("/proc").mkdir(exist_ok=True)
        self._file("/etc/hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} lorarep-0\n")
        for given in self.container["volumeMounts"]:
            self._bind(self.volumes[given["name"]], Path(given["mountPath"]), writable=not given.get("readOnly"))
        if image is None:
            self._bind_this_package()  # after the volumes: the package may lie below /tmp
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            mount("-o", "remount,bind,ro", self._root)

    def _make_root_of_this_machine(self) -> None:
        mount("-t", "tmpfs", "-o", "mode=755", "root", self._root)
        for name in ("usr", "bin", "sbin", "lib", "lib64"):
            host = Path("/", name)
            if host.is_symlink():
                (self._root / name).symlink_to(host.readlink())
            elif host.exists():
                self._bind(host, host)
        self._file("/home/lorarep/.profile").write_text("")
        self._file("/etc/passwd").write_text("lorarep:x:10001:10001::/home/lorarep:/bin/sh\n")
        self._file("/etc/group").write_text("lorarep:x:10001:\n")
        self._file("/etc/ld.so.cache").write_bytes(Path("/etc/ld.so.cache").read_bytes())

    def _bind_this_package(self) -> None:
        # The package is found at its path on this machine, and in /opt/lorarep as in the image.
        package = Path(lorarep_server.__file__).parent
        prefixes = {Path(sys.base_prefix), Path(sys.prefix), package.parents[1]}
        for prefix in prefixes:
            if not any(prefix.is_relative_to(other) for other in [*prefixes - {prefix}, Path("/usr")]):
                self._bind(prefix, prefix)
        self._bind(Path(sys.prefix) / "bin", Path("/opt/lorarep/bin"))
        self._bind(package / "demo" / "models", DEMO)

    def _file(self, path: str | Path) -> Path:
        """The path on this machine of a file in the container. Its folder is made."""
        file = self._root / str(path).removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _bind(self, source: Path, path: Path, *, writable: bool = False) -> None:
        target = self._file(path)
        target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
        mount("--rbind", source, target)
        if not writable:
            mount("-o", "remount,bind,ro", target)

    def command(self, *arguments: str) -> list[str]:
        """The command that runs `arguments` as the container's process: as PID 1, with its user and its rights."""
        context = {**self.spec["securityContext"], **self.container["securityContext"]}
        assert context["capabilities"] == {"drop": ["ALL"]}
        user, group = context["runAsUser"], context["runAsGroup"]
        # As runtimes do: this machine's root is unmounted.
        enter = 'mount -t proc proc "$0/proc" && cd "$0" && pivot_root . . && umount -l . && exec "$@"'
        container = ["unshare", "--pid", "--fork", "--mount", "sh", "-c", enter, str(self._root)]
        rights = ["setpriv"] if context["allowPrivilegeEscalation"] else ["setpriv", "--no-new-privs"]
        if HAS_USERS:
            rights += [f"--reuid={user}", f"--regid={group}", f"--groups={context['fsGroup']}"]
            rights += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        else:
            rights = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}", *rights]
        return [*container, *rights, *arguments]

    def env(self) -> dict[str, str]:
        """The whole environment of the container's process."""
        env = {**self.image.env, "HOME": "/home/lorarep", "HOSTNAME": "lorarep-0"}
        for variable in self.container["env"]:
            if "value" in variable:
                env[variable["name"]] = variable["value"]
            elif field := variable["valueFrom"].get("resourceFieldRef"):
                kind, name = field["resource"].split(".")
                env[variable["name"]] = self.container["resources"][kind][name]
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                if reference["name"] in self._secrets or not reference["optional"]:
                    env[variable["name"]] = self._secrets[reference["name"]]
        return env

    def run(self, *arguments: str) -> str:
        """Runs a command in place of the server, and returns its standard output."""
        ended = subprocess.run(self.command(*arguments), env=self.env(), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    @contextmanager
    def started(self, env: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
        """Starts the container. Yields the process that runs it, and the container's own process.

        Args:
            env: environment variables that the manifest does not set.
        """
        command = self.command(*self.image.entrypoint, *self.container["args"])
        with subprocess.Popen(command, env={**self.env(), **env}) as runtime:
            try:
                yield runtime, wait_for(psutil.Process(runtime.pid).children, "the container's process")[0]
            finally:
                for left in psutil.Process().children(recursive=True):
                    left.kill()

    def probe(self, name: str) -> int | None:
        """The status that a probe gets; None if it gets no answer."""
        probe = self.container[name]
        with grpc.insecure_channel(f"{ADDRESS}:{probe['grpc']['port']}") as channel:
            asked = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            health = health_pb2_grpc.HealthStub(channel)
            try:
                return int(health.Check(asked, timeout=probe.get("timeoutSeconds", 1)).status)
            except grpc.RpcError:
                return None

    def wait_started(self, runtime: subprocess.Popen[bytes]) -> None:
        """Waits until the startup probe succeeds, for as long as its thresholds allow."""
        probe = self.container["startupProbe"]
        end = time.monotonic() + probe["failureThreshold"] * probe["periodSeconds"]
        while time.monotonic() < end:  # the kubelet asks less often
            if self.probe("startupProbe") == SERVING:
                return
            assert runtime.poll() is None
            time.sleep(0.25)
        pytest.fail("the startup probe gave up")


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def open_stream(stub: Any, adapter: str, token: str = TOKEN) -> Any:
    """The call of one stream of NEW_TOKENS tokens."""
    wanted = generation_pb2.GenerateStreamRequest(request=request("Hello", adapter, new_tokens=NEW_TOKENS))
    return stub.GenerateStream(wanted, metadata=[("authorization", f"Bearer {token}")])


@pytest.fixture(autouse=True)
def loopback() -> None:
    """Brings up loopback, the only interface of this network namespace."""
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


@pytest.fixture
def models() -> Path:
    """The models that test_pod.py has made."""
    return Path(os.environ["LORAREP_POD_MODELS"])


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "air-gapped"])
def test_serves_and_leaves(overlay: str, models: Path, tmp_path: Path) -> None:
    objects = render(DEPLOY / "overlays" / overlay)
    secrets = {"lorarep-tokens": f"generate {TOKEN}\n"}
    folder = tmp_path / "pod"
    folder.mkdir()
    pod = Pod(objects, folder, {"lorarep-models": models}, secrets)
    adapter, *_ = yaml.safe_load(objects["ConfigMap", "lorarep-adapters"]["data"]["adapters.yaml"])
    assert_confined(pod)
    with ExitStack() as stack:
        env = {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}  # the servers of tests share the cores
        if overlay == "gpu":  # the overlay that uses the Hub
            hub = stack.enter_context(FaultyHub())
            hub.publish("mistralai/Mistral-7B-v0.1", models / "Mistral-7B-v0.1")
            name = "Fewshot-Metamath-OrcaVicuna-Mistral-10B"
            hub.publish(f"abacusai/{name}", models / name)
            env["HF_ENDPOINT"] = hub.url
        runtime, process = stack.enter_context(pod.started(env))
        ports = {port["name"]: f"{ADDRESS}:{port['containerPort']}" for port in pod.container["ports"]}
        pod.wait_started(runtime)
        assert pod.probe("readinessProbe") == pod.probe("livenessProbe") == SERVING
        pod.run(*pod.image.healthcheck)
        with urllib.request.urlopen(f"http://{ports['metrics']}/metrics", timeout=5) as metrics:
            assert b"lorarep_requests_running" in metrics.read()

        body = json.dumps({"model": adapter, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}).encode()
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://{ports['openai']}/v1/completions", body, headers)
        with urllib.request.urlopen(asked, timeout=60) as completion:
            assert json.load(completion)["usage"]["completion_tokens"] == 4

        stub = generation_pb2_grpc.GenerationServiceStub(stack.enter_context(grpc.insecure_channel(ports["grpc"])))
        alone = list(stream_tokens(open_stream(stub, adapter)))
        assert len(alone) == NEW_TOKENS
        with pytest.raises(grpc.RpcError) as refused:
            list(stream_tokens(open_stream(stub, adapter, token="of-nobody")))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

        whole: list[tuple[float, float]] = []
        with ThreadPoolExecutor(CALLERS) as callers:
            call = partial(open_stream, stub, adapter)
            calling = [callers.submit(stream_until_refused, call, alone, whole) for _ in range(CALLERS)]
            # As the kubelet deletes a pod: the grace period begins, the hook runs to its end, then the signal is sent.
            end = time.monotonic() + pod.spec["terminationGracePeriodSeconds"]
            hooked = time.monotonic() + pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
            while time.monotonic() < hooked:
                assert pod.probe("readinessProbe") == pod.probe("livenessProbe") == SERVING
                time.sleep(0.5)
            assert not any(caller.done() for caller in calling)
            told = time.monotonic()
            process.send_signal(pod.image.stop_signal)
            wait_for(lambda: pod.probe("readinessProbe") == NOT_SERVING, "readiness to go", 10)
            assert pod.probe("livenessProbe") == SERVING
            assert runtime.wait(end - time.monotonic()) == 0
            for caller in calling:
                caller.result()
        assert any(began < told < ended for began, ended in whole)


def assert_confined(pod: Pod) -> None:
    """Asserts that the container has the user, the rights and the read-only mounts of the manifest."""
    status = pod.run("cat", "/proc/self/status").splitlines()
    said = dict(line.split(":\t", 1) for line in status)
    context = pod.spec["securityContext"]
    assert said["Uid"].split() == [str(context["runAsUser"])] * 4
    assert said["Gid"].split() == [str(context["runAsGroup"])] * 4
    assert (said["NoNewPrivs"], int(said["CapEff"], 16), int(said["CapPrm"], 16)) == ("1", 0, 0)
    given = {mount["mountPath"]: not mount.get("readOnly") for mount in pod.container["volumeMounts"]}
    folders = ["/", "/etc", "/home/lorarep", "/opt/lorarep", "/opt/lorarep/bin", "/usr", str(ROOT), *given]
    touch = 'for folder; do touch "$folder/new" && rm "$folder/new" && echo "$folder"; done; true'
    assert pod.run("sh", "-c", touch, "sh", *folders).split() == [path for path, writable in given.items() if writable]
