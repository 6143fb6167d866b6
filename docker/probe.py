"""A container's health check: `probe.py PORT PATH` exits with 0 if the response is a 200."""

import http.client
import sys

SECONDS = 4


def main() -> int:
    """Return the exit status. Requests the path from 127.0.0.1, without any proxy."""
    port, path = int(sys.argv[1]), sys.argv[2]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        print(response.read(1000).decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"{path} on port {port}: {error}")
        return 1
    finally:
        connection.close()
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
