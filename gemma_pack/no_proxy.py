"""The hosts that are reached without a proxy, as far as httpx can read them."""

from __future__ import annotations

import os


def leave_out_ipv6_networks() -> None:
    """Take the networks of IPv6 out of NO_PROXY, on which httpx stops every command.

    Such as fd00::/8, which OpenShift sets where it has addresses of both kinds. httpx makes a URL of each entry
    (`_utils.get_environment_proxies`), takes the second colon for one before a port, and raises InvalidURL. Networks
    of IPv4 become a host that nobody has, so those do nothing, and do no harm.
    """
    for variable in ("NO_PROXY", "no_proxy"):
        said = os.environ.get(variable, "")
        if ":" in said and "/" in said:
            os.environ[variable] = ",".join(part for part in said.split(",") if not _is_ipv6_network(part.strip()))


def _is_ipv6_network(part: str) -> bool:
    import ipaddress  # here, because --help need not wait for it

    try:
        return "/" in part and ipaddress.ip_network(part, strict=False).version == 6
    except ValueError:
        return False
