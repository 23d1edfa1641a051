"""The connection to Kubeflow Pipelines: kfp's own client, quick to fail, with one line an error.

Hand-written, because kfp's client lacks it: time limits, a single try where a request may have arrived, all
pages of a list, errors in one line. It also prints links, and keeps a namespace and a login in the home.
"""

import base64
import contextlib
import gzip
import html
import io
import json
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3
from kfp import client as kfp_client
from urllib3 import exceptions

from core.errors import AdaptPrunerError, ClusterError, SettingsError, refuse
from core.redaction import without_password

_TIMEOUT_S = (5.0, 60.0)  # to connect, to answer
_PAGE = 100
_LOGIN = "Get a new one, and give it by --token-file, --cookie-file or KFP_EXISTING_TOKEN"
_NAMESPACE_OF_POD = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
_UNKNOWN = "unknown"


class Client(kfp_client.Client):
    """kfp's client, which neither reads nor writes the home."""

    namespace: str | None = None
    """The user's, None where Kubeflow serves one user."""
    ui = ""
    """Address of the UI, "" if it is not known."""

    def _load_context_setting_or_default(self) -> None:
        self._context_setting = {"namespace": _UNKNOWN}  # without one, kfp asks the server, without a limit

    def set_user_namespace(self, namespace: str | None) -> None:
        """Use ``namespace`` from here on."""
        self._context_setting["namespace"] = namespace or ""
        self.namespace = namespace

    def asked(self) -> contextlib.AbstractContextManager[None]:
        """Give a block in which the cluster is asked: quiet, and with errors of one line."""
        return _asked(self.place())

    def link(self, kind: str, id_: str) -> str:
        """Return the UI's page of something, such as ``runs``; its id where the UI's address is not known."""
        if not self.ui:
            return f"{id_} (set KF_PIPELINES_UI_ENDPOINT for a link)"
        return f"{self.ui}/#/{kind}/details/{id_}"

    def place(self) -> str:
        """Return the host, for messages."""
        return without_password(str(self.runs.api_client.configuration.host))

    def workflow(self, run_id: str) -> dict[str, Any] | None:
        """Return Argo's workflow of a run, by the older API (v1beta1); None where that does not serve it."""
        answer = self._get("/apis/v1beta1/runs/{run_id}", run_id=run_id)
        try:
            # A pending run has none yet.
            workflow = json.loads(answer["pipeline_runtime"].get("workflow_manifest") or "{}")
            status = workflow.get("status") or {}
            if packed := status.get("compressedNodes"):  # Argo's way once the whole is over 1 MiB
                status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        except (LookupError, TypeError, AttributeError, ValueError, EOFError, OSError, zlib.error):
            return None
        return dict(workflow)

    def version(self) -> str:
        """Return the version of the server, "" if it does not say: builds of one's own do not."""
        answer = self._get("/apis/v2beta1/healthz")
        said = str(answer.get("tag_name") or answer.get("apiServerTagName") or "")  # by the API, by the UI
        return said if said[:1].isdigit() else ""

    def log(self, run_id: str, node_id: str) -> str:
        """Return what a pod that has ended has logged, "" if the server cannot give it."""
        place = "/apis/v2beta1/runs/{run_id}/nodes/{node_id}/artifacts/main-logs:read"
        try:
            answer = self._get(place, run_id=run_id, node_id=node_id)
            return base64.b64decode(answer["data"]).decode(errors="replace")
        except (kfp_server_api.ApiException, ClusterError, LookupError, TypeError, ValueError):
            return ""

    def _get(self, place: str, **names: str) -> Any:
        """Return an answer as it is: the generated client drops fields, and does not know all addresses."""
        return self.runs.api_client.call_api(
            place,
            "GET",
            path_params=names,
            header_params={"Accept": "application/json"},
            response_type="object",
            auth_settings=["Bearer"],
            _return_http_data_only=True,
        )


class _Rest(kfp_server_api.rest.RESTClientObject):
    """Sends requests with a time limit, and refuses an answer that is a web page."""

    def request(self, *args: Any, _request_timeout: Any = None, **options: Any) -> Any:
        response = super().request(*args, _request_timeout=_request_timeout or _TIMEOUT_S, **options)
        if not response.data.lstrip().startswith((b"{", b"[")):
            raise ClusterError(
                "--host answers with a web page, not as an API: it is another server, or wants a login. "
                f"Correct --host, or log in. {_LOGIN}."
            )
        return response


def connect(
    *,
    host: str = "",
    namespace: str = "",
    token_file: Path | None = None,
    cookie_file: Path | None = None,
    client_id: str = "",
    other_client_id: str = "",
    kube_context: str = "",
    proxy: str = "",
    ca_cert: Path | None = None,
    no_verify_tls: bool = False,
) -> Client:
    """Log in, and make sure that Kubeflow Pipelines answers.

    The arguments are the options of ``adapt-pruner submit``; secrets come from files and the environment.

    Raises:
        SettingsError: If the address, a file or the namespace is missing or wrong.
        ClusterError: If the host cannot be reached, is another server, or denies access.
    """
    token = os.environ.get("KFP_EXISTING_TOKEN", "")
    logins = {"--client-id": client_id, "--token-file": token_file, "KFP_EXISTING_TOKEN": token}
    refuse([*_wrong_place(host, kube_context), *_wrong_login(logins, token, ca_cert)])
    host = host.rstrip("/")
    host = host if not host or "://" in host else f"https://{host}"
    cookies = _line_of("--cookie-file", cookie_file) if cookie_file else None
    credentials = None
    if token_file:
        _line_of("--token-file", token_file)
        credentials = kfp_client.ServiceAccountTokenVolumeCredentials(path=str(token_file))
    with _asked(host or "Kubeflow Pipelines"):
        client = Client(
            host=host or None,
            client_id=client_id or None,
            other_client_id=other_client_id or None,
            existing_token=token or None,
            cookies=cookies,
            credentials=credentials,
            proxy=proxy or None,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            kube_context=kube_context or None,
            verify_ssl=not no_verify_tls,
        )
        api = client.runs.api_client  # all services of the client share it
        if not host and api.configuration.host == kfp_server_api.Configuration().host:
            raise SettingsError(["--kube-context is not in the kubeconfig. Name another, or give --host."])
        api.configuration.host = api.configuration.host.rstrip("/")
        # A request that may have arrived is not sent again, and no redirect followed with a token.
        api.configuration.retries = urllib3.Retry(
            total=2, connect=1, read=1, status=0, redirect=0, raise_on_redirect=False, backoff_factor=0.2
        )
        api.rest_client = _Rest(api.configuration)
        health = client.healthzs.healthz_service_get_healthz()
    client.ui = os.environ.get("KF_PIPELINES_UI_ENDPOINT", host).rstrip("/")
    if not namespace and health.multi_user:
        if not _in_cluster():
            raise SettingsError(["--namespace is missing: this Kubeflow serves several users. Give yours."])
        namespace = Path(_NAMESPACE_OF_POD).read_text().strip()
    client.set_user_namespace(namespace or None)
    return client


@contextlib.contextmanager
def _asked(host: str) -> Iterator[None]:
    """Silence kfp's client, and turn whatever it raises into a ClusterError of one line."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except AdaptPrunerError:
        raise
    except Exception as error:  # logging in adds Google's own kinds of errors to those of two HTTP clients
        raise ClusterError(_explain(error, without_password(host))) from error
    finally:
        logging.disable(before)


def is_passing(error: BaseException | None) -> bool:
    """Return whether asking again may help."""
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


def one_line(text: str, width: int = 300) -> str:
    """Return foreign text in one line, cut to ``width``, that cannot steer a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in without_password(text))
    text = " ".join(text.split())
    return (text if len(text) <= width else f"{text[:width]} ...").rstrip(". ")


def _explain(error: Exception, host: str) -> str:
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
            return f"{host} does not answer. Check in its UI whether it was done, and try again later."
        return f"{host} cannot be reached ({text}). Check --host and the network."
    return (
        f"{host} cannot be used: {one_line(str(error)) or type(error).__name__}. Check --host and the login."
    )


def _explain_answer(error: kfp_server_api.ApiException, host: str) -> str:
    said, is_api = _message(error)
    if error.status == 401:
        return f"{host} refuses the login: it is missing or has expired ({said}). {_LOGIN}."
    if error.status == 403:
        return f"{host} denies access ({said}). Check --namespace and the rights of your account there."
    if 300 <= error.status < 400:
        target = without_password(str((error.headers or {}).get("Location", "another address")))
        return (
            f"{host} redirects to {one_line(target, 120)}. Give that as --host; if it is a login: {_LOGIN}."
        )
    if error.status == 404 and not is_api:
        return f"{host} has no API of Kubeflow Pipelines (404). Correct --host: give the address of its UI."
    if error.status in (400, 404, 409, 422):
        return f"{host} refuses the request ({error.status}): {said}. Correct that, and try again."
    return f"{host} answers {error.status} ({said}). Check its server, and try again later."


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


def _wrong_place(host: str, kube_context: str) -> Iterator[str]:
    if not host and not kube_context and not _in_cluster():
        yield "--host is missing. Give the address of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT."
    if host and not re.fullmatch(r"(https?://)?([^/\s:@]+|\[[0-9a-fA-F:]+\])(:\d+)?(/\S*)?", host):
        yield (
            f"--host={without_password(host)} is not a valid address. Write it as http://host:port or "
            "https://host/path, without a name and password."
        )
    if kube_context and host:
        yield "--kube-context and --host (or KF_PIPELINES_ENDPOINT) are both given. Leave one out."
    elif kube_context and _in_cluster():
        yield "--kube-context has no effect in a pod. Give --host, or neither."


def _wrong_login(logins: dict[str, Any], token: str, ca_cert: Path | None) -> Iterator[str]:
    given = [name for name, value in logins.items() if value]
    if len(given) > 1:
        yield f"{' and '.join(given)} are both given. Leave one out."
    if re.search(r"\s", token):
        yield "KFP_EXISTING_TOKEN contains spaces or line breaks. Give the token alone."
    if ca_cert and not ca_cert.is_file():
        yield f"--ca-cert={ca_cert} is not a file. Correct the path."


def _in_cluster() -> bool:
    return Path(_NAMESPACE_OF_POD).exists()


def _line_of(option: str, path: Path) -> str:
    """Return the one line of a file that holds a secret."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise SettingsError([f"{option}={path} cannot be read ({reason}). Correct the path."]) from None
    if not text or not text.isprintable():
        raise SettingsError([f"{option}={path} is not one line of text. Write it again."])
    return text
