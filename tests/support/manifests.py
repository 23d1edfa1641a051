"""Kubernetes manifests without a cluster: kustomizations put together, their objects strictly read."""

import re

import yaml
from kubernetes.client import models

from tests.support import openapi
from tests.support.project import ROOT

MANIFESTS = ROOT / "docker" / "kubernetes"
VERSIONS = {
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "Secret": "v1",
    "Service": "v1",
    "ServiceAccount": "v1",
    "StatefulSet": "apps/v1",
}
CHOICES = {
    "accessModes": {"ReadWriteOnce"},
    "drop": {"ALL"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "policyTypes": {"Ingress", "Egress"},
    "type": {"Recreate", "RollingUpdate", "RuntimeDefault"},
}
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "secretGenerator", "generatorOptions"}
KNOWN |= {"images", "patches"}


# --- kustomize: the part of it that our folders use


def render(folder, images=None):
    """The objects of a kustomization, as ``kubectl kustomize`` writes them; examples stand in for secrets.

    ``images`` maps the names of images to what takes the place of the placeholders.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not kustomization.keys() - KNOWN, kustomization.keys() - KNOWN
    objects = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += render(path, images) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for generator in kustomization.get("secretGenerator", ()):
        data = {}
        for name in generator["envs"]:
            data |= environment(folder / f"{name}.example")
        metadata = {"name": generator["name"]}
        objects.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data})
    for patch in kustomization.get("patches", ()):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        (target,) = [found for found in objects if identity(found) == identity(change)]
        _merge(target, change)
    for found in objects:
        found["metadata"]["namespace"] = kustomization["namespace"]
        for label in kustomization.get("labels", ()):
            found["metadata"].setdefault("labels", {}).update(label["pairs"])
        for container in containers(found):
            for image in kustomization.get("images", ()):
                if container["image"] == image["name"]:
                    pinned = f"{image['newName']}:{image['newTag']}@{image['digest']}"
                    container["image"] = (images or {}).get(image["name"], pinned)
    return objects


def environment(path, *, commented=False):
    """The variables of an env file; also those in comments, which are there to be filled in."""
    pattern = r"^#?([A-Z_]+)=(.*)$" if commented else r"^([A-Z_]+)=(.*)$"
    return dict(re.findall(pattern, path.read_text(), re.MULTILINE))


def identity(found):
    return found["kind"], found["metadata"]["name"]


def _merge(target, change):
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


# --- fields and types


def misfits(found):
    """Fields that the object's kind does not have, values of another type, and fields that are missing."""
    if found.get("apiVersion") != VERSIONS.get(found.get("kind")):
        return [f"{found.get('apiVersion')} {found.get('kind')} is of no known kind"]
    return [*openapi.misfits(models, f"V1{found['kind']}", found, found["kind"]), *_wrong_choices(found)]


def _wrong_choices(value, key=""):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _wrong_choices(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _wrong_choices(item, key)
    elif value not in CHOICES.get(key, {value}):
        yield f"{key}={value} is none of {sorted(CHOICES[key])}"


# --- what objects say of each other


def pod(found):
    """The pod template of an object, or nothing."""
    return found["spec"].get("template", {}) if found["kind"] in ("Deployment", "StatefulSet") else {}


def containers(found):
    spec = pod(found).get("spec", {})
    return [*spec.get("initContainers", ()), *spec.get("containers", ())]


def filled_in(container, known):
    """The command and the environment of a container, as the kubelet gives them to it."""
    variables = {}
    for source in container.get("envFrom", ()):
        variables |= known["ConfigMap", source["configMapRef"]["name"]]["data"]
    for env in container.get("env", ()):
        variables[env["name"]] = _expanded(env.get("value", ""), variables)
        for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
            if reference := env.get("valueFrom", {}).get(field):
                target = known[kind, reference["name"]]
                data = target.get("data", target.get("stringData"))
                if reference["key"] in data or not reference.get("optional"):
                    variables[env["name"]] = data[reference["key"]]
                else:
                    del variables[env["name"]]
    return [_expanded(word, variables) for word in container.get("command", ())], variables


def _expanded(text, variables):
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def dangling(objects):
    """Names, keys, ports and labels that lead to nothing."""
    known = {identity(found): found for found in objects}
    assert len(known) == len(objects)
    found = [problem for one in objects if pod(one) for problem in _dangling_in_pod(one, known)]
    for one in objects:
        where = "/".join(identity(one))
        if one["kind"] in ("Deployment", "StatefulSet"):
            if not _matches(one["spec"]["selector"]["matchLabels"], one):
                found.append(f"{where}: selects other pods than its own")
            service = one["spec"].get("serviceName")
            if service and ("Service", service) not in known:
                found.append(f"{where}: no service {service}")
        if one["kind"] == "Service":
            ports = [port["targetPort"] for port in one["spec"]["ports"]]
            found += _unreachable(where, one["spec"]["selector"], ports, objects)
        if one["kind"] == "NetworkPolicy":
            rules = one["spec"]["ingress"]
            ports = [port["port"] for rule in rules for port in rule["ports"]]
            found += _unreachable(where, one["spec"]["podSelector"]["matchLabels"], ports, objects)
            for rule in rules:
                for peer in rule["from"]:
                    found += _unreachable(where, peer["podSelector"]["matchLabels"], [], objects)
        texts = [str(value) for value in one.get("data", {}).values()]
        texts += [env.get("value", "") for container in containers(one) for env in container.get("env", ())]
        found += [f"{where}: {problem}" for text in texts for problem in _unknown_hosts(text, known)]
    return found


def _matches(labels, workload):
    own = pod(workload).get("metadata", {}).get("labels", {})
    return bool(own) and labels.items() <= own.items()


def _unreachable(where, labels, ports, objects):
    pods = [one for one in objects if _matches(labels, one)]
    if not pods:
        yield f"{where}: no pod has {labels}"
    names = {port["name"] for one in pods for box in containers(one) for port in box.get("ports", ())}
    for port in ports:
        if pods and port not in names:
            yield f"{where}: no port {port}"


def _unknown_hosts(text, known):
    """Services that an address of this namespace names, ``http://mlflow:5000``, and that are not there."""
    for host, port in re.findall(r"(?://|@)([a-z0-9-]+):(\d+)", text):
        service = known.get(("Service", host))
        if service is None or int(port) not in {p["port"] for p in service["spec"]["ports"]}:
            yield f"no service {host}:{port}"


def _dangling_in_pod(one, known):
    where, spec = "/".join(identity(one)), pod(one)["spec"]
    account = spec["serviceAccountName"]
    if ("ServiceAccount", account) not in known:
        yield f"{where}: no service account {account}"
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    volumes |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())}
    mounted = {mount["name"] for box in containers(one) for mount in box.get("volumeMounts", ())}
    for name in volumes ^ mounted:
        yield f"{where}: volume {name} is not declared, or not mounted"
    for box in containers(one):
        ports = {port["name"] for port in box.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = box.get(probe, {})
            action = asked.get("httpGet") or asked.get("tcpSocket")
            if action and action["port"] not in ports:
                yield f"{where}: {probe} asks port {action['port']}"
        try:
            filled_in(box, known)
        except KeyError as error:
            yield f"{where}: {error} is not there"
