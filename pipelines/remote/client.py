"""The connection to Kubeflow Pipelines: kfp's own client, quick to fail, with one line an error.

The client's own defaults wait without limit for a host that does not answer, ask one that refuses five times,
print links, and write into the user's home.
"""

import base64
import contextlib
import gzip
import html
import io
import json
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3
from kfp import client as kfp_client
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
from urllib3 import exceptions

from core.errors import AdaptPrunerError, ClusterError, SettingsError
from core.redaction import without_password

_TIMEOUT_S = (5.0, 60.0)  # to connect, to answer
_PAGE = 100
_LOGIN = "Get a new one, and give it by --token-file, --cookie-file or KFP_EXISTING_TOKEN"

QUOTA = re.compile("exceeded quota|quota exceeded", re.IGNORECASE)
"""What Kubernetes says where a quota forbids a pod."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach Kubeflow Pipelines: what ``kfp.Client`` takes."""

    host: str = ""
    """Address of the UI or of the API; empty inside the cluster, or with ``kube_context``."""
    namespace: str = ""
    """The user's namespace, where Kubeflow serves several users."""
    token: str = field(default="", repr=False)
    """A bearer token."""
    token_file: Path | None = None
    """File of a bearer token, read again for every request: it may be renewed meanwhile."""
    cookie_file: Path | None = None
    """File of the cookies that a login in the browser has left."""
    client_id: str = ""
    """Client id of Google's Identity-Aware Proxy."""
    other_client_id: str = ""
    """OAuth client id of a user's own login to it."""
    other_client_secret: str = field(default="", repr=False)
    """Secret of ``other_client_id``."""
    kube_context: str = ""
    """Context of the kubeconfig, through whose API server the client goes."""
    proxy: str = ""
    """Address of a proxy."""
    ca_cert: Path | None = None
    """File of the certificate authority of the host."""
    verify_tls: bool = True
    """Whether the host's certificate is checked."""


class Client(kfp_client.Client):
    """kfp's client with time limits, a single try where it asks five times, and no trace in the home.

    Attributes:
        namespace: The user's, None where Kubeflow serves one user.
    """

    namespace: str | None = None

    def _load_config(self, host: str | None, *args: Any, **options: Any) -> kfp_server_api.Configuration:
        config = super()._load_config(host, *args, **options)
        if not host and config.host == kfp_server_api.Configuration().host:
            raise SettingsError(["--kube-context is not in the kubeconfig. Name another, or give --host."])
        config.host = config.host.rstrip("/")
        # A request that may have arrived is not sent again, and no redirect followed with a token.
        config.retries = urllib3.Retry(
            total=2, connect=1, read=1, status=0, redirect=0, raise_on_redirect=False, backoff_factor=0.2
        )
        return config

    def _load_context_setting_or_default(self) -> None:
        """Start from nothing: the file in the home is of whatever cluster was used last, with its login."""
        self._context_setting = {"namespace": ""}

    def get_kfp_healthz(self, sleep_duration: int = 0) -> kfp_server_api.V2beta1GetHealthzResponse:
        """Ask the server how it is, once."""
        return self._healthz_api.healthz_service_get_healthz(_request_timeout=_TIMEOUT_S)

    def set_user_namespace(self, namespace: str) -> None:
        """Use ``namespace`` from here on, without writing it into the home."""
        self._context_setting["namespace"] = namespace

    def link(self, kind: str, id_: str) -> str:
        """Return the UI's page of something, such as ``runs``; its id where the UI's address is not known."""
        if not self._uihost:
            return f"{id_} (set KF_PIPELINES_UI_ENDPOINT for a link)"
        return f"{self._get_url_prefix()}/#/{kind}/details/{id_}"

    def workflow(self, run_id: str) -> dict[str, Any] | None:
        """Return a run as Argo sees it, by the older API; None where that gives none."""
        answer = self._run_api.api_client.call_api(
            "/apis/v1beta1/runs/{run_id}",
            "GET",
            path_params={"run_id": run_id},
            header_params={"Accept": "application/json"},
            response_type="object",
            auth_settings=["Bearer"],
            _return_http_data_only=True,
        )
        try:
            # A run that is pending has none yet.
            workflow = json.loads(answer["pipeline_runtime"].get("workflow_manifest") or "{}")
            status = workflow.get("status") or {}
            if packed := status.get("compressedNodes"):  # Argo's way once the whole is over 1 MiB
                status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        except (LookupError, TypeError, AttributeError, ValueError, EOFError, OSError, zlib.error):
            return None
        return dict(workflow)

    def place(self) -> str:
        """Return the host, for messages."""
        return without_password(str(self._existing_config.host))


def connect(access: Access) -> Client:
    """Log in, and make sure that Kubeflow Pipelines answers.

    Raises:
        SettingsError: If the address, a file or the namespace is missing or wrong.
        ClusterError: If the host cannot be reached, is another server, or denies access.
    """
    _check(access)
    with explained(access.host or "Kubeflow Pipelines"), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        client = Client(
            host=_with_scheme(access.host.rstrip("/")) or None,
            namespace="kubeflow",  # that of the installation, of which kfp makes addresses in the cluster
            client_id=access.client_id or None,
            other_client_id=access.other_client_id or None,
            other_client_secret=access.other_client_secret or None,
            existing_token=access.token or None,
            cookies=_content("--cookie-file", access.cookie_file),
            credentials=_credentials(access.token_file),
            proxy=access.proxy or None,
            ssl_ca_cert=str(access.ca_cert) if access.ca_cert else None,
            kube_context=access.kube_context or None,
            verify_ssl=access.verify_tls,
        )
        rest = client._run_api.api_client.rest_client  # all of the client's APIs share it
        rest.request = _limited(rest.request)
        health = client.get_kfp_healthz()
    if access.namespace:
        client.set_user_namespace(access.namespace)
    client.namespace = access.namespace or (client.get_user_namespace() if health.multi_user else None)
    if health.multi_user and not client.namespace:
        raise SettingsError(["--namespace is missing: this Kubeflow serves several users. Give yours."])
    return client


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what kfp's client prints and logs."""
    root, loud = logging.getLogger(), logging.getLogger("urllib3.connectionpool")
    levels = root.level, loud.level
    root.setLevel(logging.CRITICAL)
    loud.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(levels[0])
        loud.setLevel(levels[1])


@contextlib.contextmanager
def explained(host: str) -> Iterator[None]:
    """Turn whatever kfp's client raises into a ClusterError of one line."""
    try:
        yield
    except AdaptPrunerError:
        raise
    except Exception as error:  # logging in adds Google's own kinds of errors to those of two HTTP clients
        raise ClusterError(explain(error, without_password(host))) from error


def explain(error: Exception, host: str) -> str:
    """Return what went wrong, and what to do."""
    if isinstance(error, kfp_server_api.ApiException) and error.status:
        return _explain_answer(error, host)
    if isinstance(error, exceptions.HTTPError | kfp_server_api.ApiException):
        cause = getattr(error, "reason", None) or error
        text = one_line(str(cause).rpartition(": ")[2] or type(cause).__name__)
        if isinstance(cause, exceptions.SSLError) or "SSL" in str(cause):
            return (
                f"{host} cannot be trusted ({text}). Give --ca-cert, or correct --host (http:// or https://)."
            )
        if isinstance(cause, exceptions.ReadTimeoutError):
            return f"{host} does not answer. Look in its UI whether it was done, and try again later."
        return f"{host} cannot be reached ({text}). Check --host and the network."
    return (
        f"{host} cannot be used: {one_line(str(error)) or type(error).__name__}. Check --host and the login."
    )


def is_passing(error: Exception) -> bool:
    """Tell whether asking again may help."""
    if isinstance(error, kfp_server_api.ApiException):
        return error.status in (0, None, 408, 429) or int(error.status) >= 500
    return isinstance(error, exceptions.HTTPError)


def pages(call: Callable[..., Any], name: str, **arguments: Any) -> Iterator[Any]:
    """Yield what all pages of a listing hold under ``name``."""
    token, seen = "", set[str]()
    while token not in seen:
        seen.add(token)
        answer = call(page_token=token, page_size=_PAGE, **arguments)
        yield from getattr(answer, name) or ()
        token = answer.next_page_token or ""
        if not token:
            return


def named(name: str) -> str:
    """Return the filter of a listing for one name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _explain_answer(error: kfp_server_api.ApiException, host: str) -> str:
    said, is_api = _message(error)
    if QUOTA.search(said):
        return f"{host}: {said}. {quota_advice()}"
    if error.status == 401:
        return f"{host} refuses the login: it is missing or has expired ({said}). {_LOGIN}."
    if error.status == 403:
        return f"{host} denies access ({said}). Check --namespace and the rights of your account there."
    if 300 <= error.status < 400:
        target = without_password(str((error.headers or {}).get("Location", "another address")))
        return f"{host} leads to {one_line(target, 120)}. Give that as --host; if it is a login: {_LOGIN}."
    if error.status == 404 and not is_api:
        return f"{host} has no API of Kubeflow Pipelines (404). Correct --host: it is the address of its UI."
    if error.status in (400, 404, 409, 422):
        return f"{host} does not take it ({error.status}): {said}. Correct that, and try again."
    return f"{host} answers {error.status} ({said}). Look at its server, and try again later."


def quota_advice(own: str = "cluster") -> str:
    """Return what to do where a quota is used up, by the settings under ``own``."""
    names = f"{own}.gpus, {own}.cpu and {own}.memory"
    return f"Wait for other runs to end, ask for a larger quota, or lower {names}."


def _message(error: kfp_server_api.ApiException) -> tuple[str, bool]:
    """Return what the server has said, and whether it is the API that spoke."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        data = json.loads(body)
        said = data.get("error") or data.get("message")
    except (ValueError, AttributeError):
        text = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", body, flags=re.DOTALL)
        return one_line(html.unescape(text)) or one_line(str(error.reason)) or str(error.status), False
    return one_line(str(said)) if said else str(error.reason), True


def one_line(text: str, width: int = 300) -> str:
    """Return what a stranger has said in one line that steers no terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in without_password(text))
    text = " ".join(text.split())
    return (text if len(text) <= width else f"{text[:width]} ...").rstrip(". ")


def _limited(send: Callable[..., Any]) -> Callable[..., Any]:
    """Give each request a time limit, and refuse an answer that is a web page."""

    def request(*args: Any, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or _TIMEOUT_S
        response = send(*args, **options)
        if not response.data.lstrip().startswith((b"{", b"[")):
            raise ClusterError(
                "--host answers with a web page, not as an API: it is another server, or wants a login. "
                f"Correct --host, or log in. {_LOGIN}."
            )
        return response

    return request


def _check(access: Access) -> None:
    problems = []
    if not access.host and not access.kube_context and not _in_cluster():
        problems.append(
            "--host is missing. Give the address of Kubeflow Pipelines, or KF_PIPELINES_ENDPOINT."
        )
    if access.host and not re.fullmatch(
        r"(https?://)?([^/\s:@]+|\[[0-9a-fA-F:]+\])(:\d+)?(/\S*)?", access.host
    ):
        problems.append(
            f"--host={without_password(access.host)} is no address. Write it as http://host:port or "
            "https://host/path, without a name and password."
        )
    logins = {
        "--client-id": access.client_id,
        "--token-file": access.token_file,
        "KFP_EXISTING_TOKEN": access.token,
    }
    given = [name for name, value in logins.items() if value]
    if len(given) > 1:
        problems.append(f"{' and '.join(given)} are both given. Leave one out.")
    if access.kube_context and access.host:
        problems.append("--kube-context and --host (or KF_PIPELINES_ENDPOINT) are both given. Leave one out.")
    elif access.kube_context and _in_cluster():
        problems.append("--kube-context counts for nothing in a pod. Give --host, or neither.")
    if re.search(r"\s", access.token):
        problems.append("KFP_EXISTING_TOKEN holds blanks or line ends. Give the token alone.")
    if access.ca_cert and not access.ca_cert.is_file():
        problems.append(f"--ca-cert={access.ca_cert} is no file. Correct the path.")
    if problems:
        raise SettingsError(problems)


def _with_scheme(host: str) -> str:
    return host if not host or "://" in host else f"https://{host}"


def _in_cluster() -> bool:
    return Path(kfp_client.Client._NAMESPACE_PATH).exists()


def _content(option: str, path: Path | None) -> str | None:
    """Return the one line of a file that holds a secret."""
    if path is None:
        return None
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError([f"{option}={path} cannot be read ({reason}). Correct the path."]) from None
    if not text or not text.isprintable():
        raise SettingsError([f"{option}={path} is not one line of text. Write it again."])
    return text


def _credentials(path: Path | None) -> ServiceAccountTokenVolumeCredentials | None:
    if path is None:
        return None
    _content("--token-file", path)
    return ServiceAccountTokenVolumeCredentials(path=str(path))
