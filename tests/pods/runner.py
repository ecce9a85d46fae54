"""A kubelet's part for one pod, with processes: order, gates, probes, restarts, and the end.

Containers that fail are started again at once, then after a second each time (a kubelet waits from
10 s on). A hook that fails ends its own container and holds up nobody else, as in a kubelet.
"""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.pods import spec as pod_spec
from tests.pods.container import Container, Image, Mount
from tests.pods.network import POD_IP, Network, enter
from tests.pods.spec import Json
from tests.pods.volumes import Payload, empty_dir, labels_file, token_for
from tests.support.processes import wait_until

TICK = 0.02
BACKOFF = 1.0
GRACE = 30.0

Files = Mapping[str, str]


class Pod:
    """A pod that runs, for as long as the block lasts.

    `config_maps` are the namespace's, `images` what stands for them, by name. `network` is there
    already, where others are in it too; `hosts` has addresses, by the names that DNS would know.
    """

    def __init__(
        self,
        pod: Json,
        *,
        images: Mapping[str, Image],
        config_maps: Mapping[str, Files],
        folder: Path,
        addresses: tuple[str, ...] = (POD_IP,),
        network: Network | None = None,
        hosts: Mapping[str, str] | None = None,
    ) -> None:
        pod_spec.check(pod)
        self.spec, self.folder = pod["spec"], folder
        self.images, self._guest = images, network is not None
        self.network = network or Network(*addresses)
        own = self.network.addresses
        self.fields = pod_spec.fields(pod, own)
        known = {"localhost": "127.0.0.1", pod["metadata"]["name"]: own[0], **(hosts or {})}
        self.hosts = folder / "hosts"
        self.hosts.parent.mkdir(parents=True, exist_ok=True)
        self.hosts.write_text("".join(f"{address} {name}\n" for name, address in known.items()))
        self.stopping = threading.Event()
        self.payloads: dict[str, Payload] = {}
        self.volumes = dict(self._volumes(pod, config_maps))
        everybody = [(each, True) for each in self.spec.get("initContainers") or ()]
        everybody += [(each, False) for each in self.spec["containers"]]
        self.members = {each["name"]: Member(self, each, first) for each, first in everybody}
        self._kubelet = threading.Thread(target=self._run, name="kubelet")

    def _volumes(self, pod: Json, config_maps: Mapping[str, Files]) -> Iterator[tuple[str, Path]]:
        for each in self.spec.get("volumes") or ():
            path = self.folder / "volumes" / each["name"]
            if "emptyDir" in each:
                yield each["name"], empty_dir(path)
                continue
            said, files = self._files(pod, each, config_maps)
            self.payloads[each["name"]] = Payload(path, files, said.get("defaultMode", 0o644))
            yield each["name"], path

    def _files(self, pod: Json, volume: Json, maps: Mapping[str, Files]) -> tuple[Json, Files]:
        """What is said of a volume with files, and the files."""
        if "configMap" in volume:
            said = volume["configMap"]
            return said, maps[said["name"]]
        if "projected" in volume:
            said = volume["projected"]
            tokens = [each["serviceAccountToken"] for each in said["sources"]]
            return said, {each["path"]: token_for(each["audience"]) for each in tokens}
        said = volume["downwardAPI"]
        return said, {item["path"]: self._field(pod, item) for item in said["items"]}

    def _field(self, pod: Json, item: Json) -> str:
        path = item["fieldRef"]["fieldPath"]
        if path == "metadata.labels":
            return labels_file(pod["metadata"].get("labels") or {})
        return self.fields[path]

    # ── What it is like ───────────────────────────────────────────────────────────────────────────

    @property
    def ready(self) -> bool:
        """As a Service would have it: whether it gets connections."""
        lasting = [each for each in self.members.values() if each.lasting]
        return all(each.ready for each in lasting)

    @property
    def phase(self) -> str:
        """`Pending`, `Running`, `Succeeded` or `Failed`."""
        own = [each for each in self.members.values() if not each.first]
        if any(each.first and each.failed for each in self.members.values()):
            return "Failed"
        if not any(each.begun for each in own):
            return "Pending"
        if not all(each.given_up for each in own):
            return "Running"
        return "Succeeded" if all(each.codes[-1] == 0 for each in own) else "Failed"

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Until connections would come."""
        self._wait(lambda: self.ready, "ready", timeout)

    def wait_phase(self, phase: str, timeout: float = 30.0) -> None:
        """Until it is in this phase."""
        self._wait(lambda: self.phase == phase, phase, timeout)

    def _wait(self, condition: Any, what: str, timeout: float) -> None:
        try:
            wait_until(condition, f"the pod is {what}", timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def log(self, name: str) -> str:
        """What a container has written."""
        path = self.folder / f"{name}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def logs(self) -> str:
        """The end of what each has written."""
        return "".join(
            f"── {name}: codes {each.codes}, ready {each.ready}\n{self.log(name)[-3000:]}"
            for name, each in self.members.items()
        )

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    # ── Its life ──────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Self:
        if not self._guest:
            self.network.__enter__()
        self._kubelet.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        for each in self.members.values():
            each.kill()
        self._kubelet.join()
        if not self._guest:
            self.network.__exit__(kind, error, trace)

    def delete(self, grace: float = GRACE) -> None:
        """End it: first those of its own, all at once, then the sidecars, the last one first."""
        self.stopping.set()
        deadline = time.monotonic() + grace
        own = [each for each in self.members.values() if not (each.first and each.lasting)]
        enders = [threading.Thread(target=each.end, args=(deadline,)) for each in own]
        for thread in enders:
            thread.start()
        for thread in enders:
            thread.join()
        self._end_sidecars(deadline)

    def _end_sidecars(self, deadline: float) -> None:
        for each in reversed(self.members.values()):
            if each.first and each.lasting:
                each.end(deadline)

    def _run(self) -> None:
        enter(self.network.outside)
        for each in self.members.values():
            if self.stopping.is_set():
                return
            each.begin()
            each.passed.wait()
            if each.first and each.failed:
                return
        own = [each for each in self.members.values() if not each.first]
        while not self.stopping.wait(TICK):
            if all(each.given_up for each in own):
                self.stopping.set()
                self._end_sidecars(time.monotonic() + GRACE)


class Member:
    """A container of a pod: each of its lives, one after the other, in a thread of its own."""

    def __init__(self, pod: Pod, spec: Json, first: bool) -> None:
        self._pod, self._spec, self.first = pod, spec, first
        policy = pod.spec.get("restartPolicy", "Always")
        self._policy = spec.get("restartPolicy", policy) if first else policy
        self.lasting = not first or spec.get("restartPolicy") == "Always"
        self._thread = threading.Thread(target=self._live, name=spec["name"])
        self.container: Container | None = None
        self.codes: list[int] = []
        self.begun = self.started = self.given_up = False
        self._is_ready = False
        self.passed = threading.Event()
        """Set when the next container of the pod may be started."""

    @property
    def ready(self) -> bool:
        """Whether it runs, has started, and its readiness probe says so."""
        container = self.container
        return container is not None and container.code is None and self._is_ready

    @property
    def failed(self) -> bool:
        """Whether it has ended for good, and not well."""
        return self.given_up and self.codes[-1:] != [0]

    def begin(self) -> None:
        """Let it live."""
        self.begun = True
        self._thread.start()

    def end(self, deadline: float) -> None:
        """Ask it to end, see to it that it has by the deadline, and that its end is on record."""
        container = self.container
        if container is not None and container.code is None:
            hook = (self._spec.get("lifecycle") or {}).get("preStop")
            if hook is not None:
                with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    container.exec(hook["exec"]["command"], max(deadline - time.monotonic(), 1))
            container.signal(signal.SIGTERM)
            if not container.wait(deadline - time.monotonic()):
                container.kill()
        if self.begun:
            self._thread.join()

    def kill(self) -> None:
        """End it now, whatever it does."""
        while self.begun and self._thread.is_alive():
            if self.container is not None and self.container.code is None:
                self.container.kill()
            self._thread.join(TICK)

    def _live(self) -> None:
        try:
            enter(self._pod.network.outside)
            while not self._pod.stopping.is_set():
                code = self._once()
                self.codes.append(code)
                if self._is_over(code):
                    break
                if len(self.codes) > 1:
                    self._pod.stopping.wait(BACKOFF)
        finally:
            self.given_up = True
            self.passed.set()

    def _is_over(self, code: int) -> bool:
        if self.first and not self.lasting and code == 0:
            return True
        return self._policy == "Never" or (self._policy == "OnFailure" and code == 0)

    def _once(self) -> int:
        """One life: its exit code."""
        self.started = self._is_ready = False
        container = self.container = self._start()
        hook = (self._spec.get("lifecycle") or {}).get("postStart")
        if hook is not None and not _succeeds(container, hook["exec"]["command"], 600.0):
            self._stop(container)
        if not self.first:
            self.passed.set()
        probes = Probes(self._spec, container, self._pod.network.addresses[0])
        while (code := container.code) is None:
            self.started = self.started or probes.startup()
            if self.started:
                if self.lasting:
                    self.passed.set()
                self._is_ready = probes.readiness()
            if not self._pod.stopping.is_set() and probes.failed():
                self._stop(container)
            container.wait(TICK)
        if self.first and not self.lasting and code == 0:
            self.passed.set()
        return code

    def _stop(self, container: Container) -> None:
        container.signal(signal.SIGTERM)
        if not container.wait(self._pod.spec.get("terminationGracePeriodSeconds", GRACE)):
            container.kill()

    def _start(self) -> Container:
        pod, spec = self._pod, self._spec
        env = pod_spec.environment(spec.get("env"), pod.fields)
        image = pod.images[spec["image"]]
        words = spec.get("command") or list(image.entrypoint)
        root = pod.folder / "roots" / spec["name"]
        root.mkdir(parents=True, exist_ok=True)
        return Container(
            spec,
            image,
            mounts=[
                Mount(pod.hosts, "/etc/hosts", read_only=False),
                *(
                    Mount(pod.volumes[each["name"]], each["mountPath"], bool(each.get("readOnly")))
                    for each in spec.get("volumeMounts") or ()
                ),
            ],
            env=env,
            command=[pod_spec.expand(each, env) for each in [*words, *(spec.get("args") or ())]],
            network=pod.network.pod,
            root=root,
            log=pod.folder / f"{spec['name']}.log",
            pod_context=pod.spec.get("securityContext") or {},
        )


class Probes:
    """The questions to one life of a container, each asked when its time has come."""

    def __init__(self, spec: Json, container: Container, address: str) -> None:
        self._probes = {
            kind: Probe(spec[kind], spec, container, address)
            for kind in ("startupProbe", "livenessProbe", "readinessProbe")
            if kind in spec
        }

    def startup(self) -> bool:
        """Whether it has started."""
        probe = self._probes.get("startupProbe")
        return probe is None or probe.ask() is True

    def readiness(self) -> bool:
        """Whether it is ready; without a probe whoever has started is."""
        probe = self._probes.get("readinessProbe")
        return probe is None or probe.ask() is True

    def failed(self) -> bool:
        """Whether it is to be started anew: it has not started, or lives no more."""
        startup, liveness = self._probes.get("startupProbe"), self._probes.get("livenessProbe")
        if startup is not None and startup.verdict is not True:
            return startup.verdict is False
        return liveness is not None and liveness.ask() is False


class Probe:
    """A question with its memory: the verdict is None until there is one."""

    def __init__(self, said: Json, spec: Json, container: Container, address: str) -> None:
        self._said, self._spec, self._container = said, spec, container
        self._address = address
        self._next = time.monotonic() + said.get("initialDelaySeconds", 0)
        self._failures = 0
        self.verdict: bool | None = None

    def ask(self) -> bool | None:
        """The verdict, after the question was asked where its time has come."""
        if time.monotonic() < self._next:
            return self.verdict
        self._next = time.monotonic() + self._said.get("periodSeconds", 10)
        if self._is_well():
            self._failures, self.verdict = 0, True
        else:
            self._failures += 1
            if self._failures >= self._said.get("failureThreshold", 3):
                self.verdict = False
        return self.verdict

    def _is_well(self) -> bool:
        seconds = float(self._said.get("timeoutSeconds", 1))
        if "exec" in self._said:
            return _succeeds(self._container, self._said["exec"]["command"], seconds)
        asked = self._said.get("httpGet") or self._said["tcpSocket"]
        port = self._port(asked["port"])
        with suppress(OSError, http.client.HTTPException):
            if "tcpSocket" in self._said:
                socket.create_connection((self._address, port), seconds).close()
                return True
            connection = http.client.HTTPConnection(self._address, port, timeout=seconds)
            headers = {each["name"]: each["value"] for each in asked.get("httpHeaders") or ()}
            try:
                connection.request("GET", asked.get("path", "/"), headers=headers)
                return 200 <= connection.getresponse().status < 400
            finally:
                connection.close()
        return False

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        ports = self._spec.get("ports") or ()
        return int(next(each["containerPort"] for each in ports if each.get("name") == port))


def _succeeds(container: Container, command: list[str], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        return container.exec(command, seconds).returncode == 0
    return False
