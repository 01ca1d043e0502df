"""The hub's public port as a configuration of nginx, in place of `server.front`.

Tried with nginx 1.22. Where it differs from the front: a body's time is counted from one piece to
the next, an IPv6 address is counted by itself, and a renewed certificate waits for a reload.
"""

from __future__ import annotations

from server.front import (
    CALLS,
    CONNECT_S,
    KEEP_ALIVE_S,
    REQUEST_HEADERS,
    FrontError,
    PublicPort,
    public_port,
)
from server.hub import HubFolder

_HIDDEN = ("Location", "Refresh", "Set-Cookie", "Upgrade", "Vary", "X-Powered-By")
_SPECIAL = set("\"'\\$;{}#") | {chr(code) for code in range(32)}


def hub_configuration(hub: HubFolder) -> str:
    """The configuration for `hub`. Raises as `nginx_configuration` and `public_port` do."""
    return nginx_configuration(public_port(hub))


def nginx_configuration(port: PublicPort) -> str:
    """What nginx is to include within its `http { }`, such as a file in /etc/nginx/conf.d.

    Raises:
        FrontError: A path has a character that means something to nginx.
    """
    limits = port.limits
    headers = "\n    ".join(
        f"proxy_set_header {name} $http_{name.replace('-', '_')};" for name in REQUEST_HEADERS
    )
    hidden = "\n    ".join(f"proxy_hide_header {name};" for name in _HIDDEN)
    listen = f"[{port.listen}]" if ":" in port.listen else port.listen
    return f"""\
# The public port of a hub: passes on what a site's SuperNode calls, and nothing else.
# Made by `python -m server nginx`; make it again rather than change it. After a renewal of the
# certificate: nginx -s reload

limit_req_zone $binary_remote_addr zone=hub_calls:10m rate={_per_minute(limits.requests_per_s)};
limit_req_zone $binary_remote_addr zone=hub_activations:10m rate={limits.activations_per_minute}r/m;
limit_conn_zone $binary_remote_addr zone=hub_address:10m;
limit_conn_zone $server_port zone=hub_all:1m;

server {{
    listen {listen}:{port.port} ssl;
    server_tokens off;
    access_log off;

    ssl_certificate {_path(port.certificate)};
    ssl_certificate_key {_path(port.key)};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_session_tickets off;

    # Of a handshake and a head, of each piece of a body, of each piece of an answer.
    client_header_timeout {_ms(limits.idle_timeout_s)};
    client_body_timeout {_ms(limits.body_timeout_s)};
    send_timeout {_ms(limits.idle_timeout_s)};
    keepalive_timeout {KEEP_ALIVE_S}s;
    lingering_time 5s;
    reset_timedout_connection on;
    large_client_header_buffers 4 4k;
    client_max_body_size {limits.largest_body};

    # 503 and not 429, which ends a SuperNode.
    limit_req_status 503;
    limit_conn_status 503;
    limit_conn hub_address {limits.connections_per_address};
    limit_conn hub_all {limits.connections};
    limit_req zone=hub_calls burst={limits.burst - 1} nodelay;
    error_page 503 @later;

    # Both ways as it comes, no body on disk.
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_next_upstream off;
    proxy_redirect off;
    proxy_connect_timeout {CONNECT_S}s;
    proxy_send_timeout {_ms(limits.superlink_timeout_s)};
    proxy_read_timeout {_ms(limits.superlink_timeout_s)};
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {_path(port.authority)};
    proxy_ssl_name localhost;

    # A closed list of headers.
    proxy_pass_request_headers off;
    {headers}
    {hidden}

    location / {{
        return 404;
    }}

    location @later {{
        add_header Retry-After 1 always;
        return 503;
    }}
{"".join(_location(call, port) for call in CALLS)}}}
"""


def _location(call: str, port: PublicPort) -> str:
    path = f"/v1/fleet/{call}"
    # A `limit_req` of its own replaces those of the server.
    rates = f"""
        limit_req zone=hub_calls burst={port.limits.burst - 1} nodelay;
        limit_req zone=hub_activations burst={port.limits.activations_per_minute - 1} nodelay;"""
    # nginx finds a location by the path that it has decoded and normalised: `$request` is the line
    # as it came.
    return f"""
    location = {path} {{
        if ($request != "POST {path} HTTP/1.1") {{
            return 404;
        }}{rates if call == "activate-node" else ""}
        proxy_pass https://127.0.0.1:{port.superlink_port}{path};
    }}
"""


def _path(path: object) -> str:
    if _SPECIAL & set(str(path)):
        raise FrontError(f"{str(path)!r}: nginx cannot be told this path; move the hub's folder")
    return f'"{path}"'


def _ms(seconds: float) -> str:
    return f"{round(1000 * seconds)}ms"


def _per_minute(per_s: float) -> str:
    return f"{max(1, round(60 * per_s))}r/m"
