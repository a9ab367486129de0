"""Configuration of images, audio and video in requests to a generator."""

import re
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ByteSize, Field

from cluster.config.section import Section

_DOMAIN = re.compile(r"(\*|(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?)(:\d{1,5})?")


def _check_domain(domain: str) -> str:
    if not _DOMAIN.fullmatch(domain):
        raise ValueError(
            "write a host name in lower case, such as `images.example.com`; `*.example.com` for "
            "all hosts below it, and `host:8080` for a port other than 80 and 443"
        )
    return domain


MediaDomain = Annotated[str, AfterValidator(_check_domain)]


class MediaConfig(Section):
    """Images, audio and video in requests, as data or by URL. Limits are per replica."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"max_items"})

    allowed_domains: tuple[MediaDomain, ...] = ()
    """Hosts from which replicas fetch media by URL: `images.example.com`, `*.example.com` (all
    hosts below it), `host:8080` (another port than 80 and 443), or `*`. Default: none; requests
    with such URLs get status 400."""
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Private networks, such as `10.2.0.0/16`, in which allowed hosts may be. Default: none; a host
    must have public addresses only."""
    max_bytes: ByteSize = Field(ByteSize(20 * 1024**2), ge=1024)
    """Maximum size of one image, audio or video file, in bytes or with a unit. Data in requests is
    also limited by `router.max_body_bytes`."""
    timeout_s: float = Field(10.0, gt=0, le=600)
    """Maximum duration of fetching one file, redirects included, in seconds."""
    max_redirects: int = Field(3, ge=0, le=10)
    """Maximum number of redirects, each to an allowed host."""
    max_fetches: int = Field(32, ge=1, le=1024)
    """Maximum number of files that one replica fetches at the same time; others wait within
    `timeout_s`."""
    max_items: int = Field(16, ge=1, le=999)
    """Maximum number of images, of audio files, and of videos in one request, unless
    `engine_args.limit_mm_per_prompt` is set."""
    max_pixels: int = Field(32_000_000, ge=1024)
    """Maximum number of pixels of one image, or of all decoded frames of one video. Each needs 3
    bytes of memory."""
