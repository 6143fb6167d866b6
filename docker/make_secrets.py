"""Makes the secrets of a fleet as files: `python3 docker/make_secrets.py docker/secrets`.

The script needs only Python. It never overwrites a file: a second run adds the missing ones. Files
that belong together, such as a password and its hash, are made together or not at all. If root runs
the script, each file belongs to the user whose container reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import sys
from pathlib import Path

VOUCHSAFE, REDIS, PROMETHEUS, GRAFANA = 10001, 999, 65534, 472
"""The users that the images run as."""
RIGHTS = (
    "~{vouchsafe}:* &{vouchsafe}:* -@all +@read +@write +@pubsub +@scripting +@connection "
    "+@transaction -@dangerous -function -script +script|load -scan -randomkey -dbsize +time +info"
)
"""The service's rights in Redis: keys and channels below its prefix, and INFO for the metrics."""


def main() -> int:
    """Return the exit status. Makes the missing files."""
    parser = argparse.ArgumentParser(description="Makes the secrets of a fleet as files.")
    parser.add_argument("folder", type=Path, help="the folder of the files")
    parser.add_argument(
        "--redis", default="redis:6379", metavar="HOST:PORT", help="address of Redis (%(default)s)"
    )
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        made = make(folder, options.redis)
    except (OSError, Incomplete) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: made {', '.join(made)}" if made else f"{folder}: complete, none was made")
    if made and os.geteuid() != 0:
        print(
            f"The files belong to user {os.geteuid()}: containers of other users cannot read them. "
            "Run this as root to give each file to its container's user",
            file=sys.stderr,
        )
    return 0


class Incomplete(RuntimeError):
    """Some of the files that belong together are missing, not all."""


def make(folder: Path, redis: str) -> list[str]:
    """Return the names of the files made: those that the folder lacked.

    Raises Incomplete, and OSError.
    """
    password, admin, scraper = (secrets.token_hex(32) for _ in range(3))
    users = [
        "user default off",
        f"user vouchsafe on #{_sha256(password)} {RIGHTS}",
        f"user admin on #{_sha256(admin)} ~* &* +@all",
        "user health on nopass -@all +ping",
    ]
    groups: list[list[tuple[str, int, bytes | str]]] = [
        [("noise.secret", VOUCHSAFE, secrets.token_bytes(32))],
        [("signing.key", VOUCHSAFE, secrets.token_bytes(32))],
        [
            ("api_keys", VOUCHSAFE, f"first:{secrets.token_hex(32)}\nprometheus:{scraper}\n"),
            ("prometheus_api_key", PROMETHEUS, scraper),
        ],
        [
            ("vouchsafe_redis_url", VOUCHSAFE, f"redis://vouchsafe:{password}@{redis}/0\n"),
            ("redis_admin_password", REDIS, admin),
            ("redis_users.acl", REDIS, "\n".join(users) + "\n"),
        ],
        [("grafana_admin_password", GRAFANA, secrets.token_hex(16))],
    ]
    made: list[str] = []
    for group in groups:
        missing = [name for name, _, _ in group if not (folder / name).exists()]
        if missing and len(missing) < len(group):
            raise Incomplete(
                f"{folder}: {', '.join(missing)} is missing, but not what belongs to it; "
                f"restore it from a backup, or remove {', '.join(name for name, _, _ in group)}"
            )
        for name, owner, content in group if missing else ():
            _write(folder / name, owner, content)
            made.append(name)
    return made


def _write(path: Path, owner: int, content: bytes | str) -> None:
    """Write the file with mode 0600, under another name first so that it is never partial."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode())
        if os.geteuid() == 0:
            os.fchown(stream.fileno(), owner, owner)
        stream.flush()
        os.fsync(stream.fileno())
    os.link(partial, path)
    partial.unlink()


def _sha256(password: str) -> str:
    """Return the hash of a password, as in an ACL file."""
    return hashlib.sha256(password.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
