#!/usr/bin/env bash
# Builds the images and runs docker-compose.yml with a real engine: `make test-images`.
#
# Needs root on Debian 12 with python3.11 (3.11.5 or later), Debian's packages and a Python package index. Takes
# 10 to 20 minutes and 25 GB below TMPDIR (/var/tmp). No image registry is used, and Docker need not be installed.
#
#   PIP_CONFIG_FILE           pip's settings while images are built; without it pip's defaults
#   TORCH_INDEX, WORKER_CPUS  as docs/operations.md describes them
#
# The engine, BuildKit and Compose come from Debian 13 and are unpacked into a scratch folder. They run in a network
# and a mount namespace of their own: bridges, firewall rules and published ports stay out of the machine's.
#
# Stand-ins take the names of the base images:
# - python: Debian 12 with this machine's python3.11
# - redis: Debian 12's redis-server
# - prometheus: Debian 12's prometheus
# Grafana has none and is not started. Entry points, versions and sizes of the true images are not tested.
#
# The context is a clone: only what is committed is tested.
# shellcheck disable=SC2016
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "test-images needs root, for namespaces and Debian's packages" >&2 && exit 1; }

TASK='{"labels": ["cat", "dog"], "shots": 1, "steps": 1, "epochs": 0, "name": "images"}'
LIMIT=1200 # Seconds for one request, and for the task: generous, for an adaptation job yields the CPU to others.
DRAIN=45   # Seconds for a worker to stop: it finishes its batch first, in at most 35.

repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp --directory "${TMPDIR:-/var/tmp}/images.XXXXXX")
export TMPDIR=$work DEBIAN_FRONTEND=noninteractive
export DOCKER_CONFIG=$work/config DOCKER_HOST=unix://$work/socket
export PATH=$work/tools/usr/bin:$work/tools/usr/sbin:$PATH
engine="" network="" # Process ids.
task=""

say() { printf '== %(%T)T %s\n' -1 "$*"; }
fail() { echo "$*" >&2 && exit 1; }
compose() { docker compose --profile cpu --profile observability "$@"; }
inside() { nsenter --target "$engine" --net "$@"; }

clean_up() {
  status=$?
  set +e
  if [ -n "$engine" ]; then
    [ $status = 0 ] || { compose logs --tail 20; [ -z "$task" ] || call "/tasks/$task"; tail -n 5 "$work/dockerd.log"; } 2>&1
    compose --profile tools down --volumes --timeout 5 >/dev/null 2>&1
    kill "$engine" && wait "$engine"
    [ -z "$network" ] || kill "$network" 2>/dev/null
  fi
  cd / && rm -rf "$work"
  exit $status
}

install_tools() {
  say "tools"
  python3.11 -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || fail "python3.11 must be 3.11.5 or later"
  apt-get -qq update
  apt-get -qq install -y --no-install-recommends curl debootstrap git iproute2 iptables runc slirp4netns tini >/dev/null
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Codename: bookworm' | sed -n 1p)
  [ -n "$mirror" ] || fail "apt has no source of Debian 12 (bookworm)"
  mkdir -p "$work"/{apt/lists/partial,apt/archives/partial,packages,tools,data,exec,config/cli-plugins}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$work/apt/list"
  local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/apt/list" -o Dir::Etc::sourceparts=/nonexistent
    -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt" -o APT::Sandbox::User=root)
  "${apt[@]}" update
  (cd "$work/packages" && "${apt[@]}" download containerd docker-buildx docker-cli docker-compose docker.io)
  for package in "$work"/packages/*.deb; do dpkg -x "$package" "$work/tools"; done
  ln -s "$work"/tools/usr/libexec/docker/cli-plugins/* "$work/config/cli-plugins/"
}

start_engine() {
  say "engine"
  echo "nameserver 10.0.2.3" >"$work/resolv.conf" # The resolver of slirp4netns.
  unshare --net --mount --propagation private sh -c '
    mount --bind "$1/resolv.conf" /etc/resolv.conf && ip link set lo up && exec dockerd --host "unix://$1/socket" \
      --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" --init-path /usr/bin/tini-static \
      --storage-driver overlay2 --userland-proxy-path "$1/tools/usr/sbin/docker-proxy"' - "$work" >"$work/dockerd.log" 2>&1 &
  engine=$!
  for _ in $(seq 60); do docker version >/dev/null 2>&1 || sleep 1; done
  slirp4netns --configure --mtu=1500 --disable-host-loopback "$engine" tap0 >"$work/network.log" 2>&1 &
  network=$!
  docker version --format 'client {{.Client.Version}}, engine {{.Server.Version}}'
}

# Copies this machine's python3.11, without its packages, to $work/python.
copy_python() {
  local prefix target=$work/python
  prefix=$(python3.11 -c 'import sys; print(sys.base_prefix)')
  mkdir -p "$target"/{etc/ssl/certs,usr/local/bin,usr/local/lib/python3.11/site-packages}
  cp "$prefix/bin/python3.11" "$target/usr/local/bin/"
  cp -P "$prefix"/lib/libpython3* "$target/usr/local/lib/" 2>/dev/null || true
  tar -C "$prefix" --exclude=site-packages --exclude=test --exclude=__pycache__ --exclude='config-3.11*' -c lib/python3.11 |
    tar -C "$target/usr/local" -x
  cp -L /etc/ssl/certs/ca-certificates.crt "$target/etc/ssl/certs/"
  [ -z "${PIP_CONFIG_FILE:-}" ] || cp "$PIP_CONFIG_FILE" "$target/etc/pip.conf"
}

# Builds the Dockerfile on standard input under the name $1, with $2 as its context.
stand_in() { docker build --quiet --tag "$1" --file - "$2" >/dev/null; }

build_stand_ins() {
  say "stand-ins for the base images"
  local python redis prometheus install='apt-get -qq update && apt-get -qq install -y --no-install-recommends >/dev/null'
  python=$(sed -nE 's/^FROM (\S+:\S+) AS base$/\1/p' docker/Dockerfile)
  redis=$(sed -nE 's/^ +image: (redis:\S+)$/\1/p' docker-compose.yml)
  prometheus=$(sed -nE 's/^ +image: (prom\/\S+)$/\1/p' docker-compose.yml)
  debootstrap --variant=minbase bookworm "$work/root" "$mirror" >"$work/debootstrap.log"
  rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
  tar -C "$work/root" --numeric-owner -c . |
    docker import --change 'ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - debian:bookworm >/dev/null
  copy_python
  stand_in "$python" "$work/python" <<END
FROM debian:bookworm
RUN $install ca-certificates netbase tzdata libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 libuuid1 zlib1g
COPY . /
RUN ldconfig && ln -s python3.11 /usr/local/bin/python && python -m ensurepip --default-pip
END
  stand_in "$redis" "$work/config" <<END
FROM debian:bookworm
RUN groupadd --gid 1000 redis && useradd --uid 999 --gid 1000 --no-create-home redis && $install redis-server && install -d -o 999 -g 1000 /data
VOLUME /data
WORKDIR /data
END
  stand_in "$prometheus" "$work/config" <<END
FROM debian:bookworm
RUN $install prometheus wget && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
END
  echo "stand-ins: $python ($(python3.11 -V)), $redis, $prometheus"
}

build_images() {
  say "images"
  docker compose --profile cpu build --quiet
  docker image ls --filter dangling=false --format '{{.Repository}}:{{.Tag}} {{.Size}}'
  for image in vouchsafe-api vouchsafe-worker-cpu; do
    found=$(docker run --rm --user 0:0 --entrypoint find "$(docker image ls --quiet "$image")" / -xdev -path /proc -prune -o \
      \( -path '*/bin/pip*' -o -path '*-packages/pip' -o -name 'pip-*.whl' \) -print)
    [ -z "$found" ] || fail "$image has pip in it: $found"
    echo "$image: no pip"
  done
}

start_fleet() {
  say "fleet"
  docker compose run --rm -T secrets
  docker compose --profile cpu up --detach --wait --no-build
  docker compose up --detach --wait --no-build prometheus
  compose ps --format '{{.Name}}: {{.Status}}'
  key=$(sed -n 's/^first://p' docker/secrets/api_keys)
}

# Calls the API at the path $1, with further options of curl.
call() { inside curl -sS --fail-with-body -m "$LIMIT" -H "Authorization: Bearer $key" "${@:2}" "http://127.0.0.1:8000$1"; }
predict() { call /predict -F image=@docs/ship.png "$@"; }
# Prints a field of the JSON on standard input.
field() { python3.11 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# Succeeds once Prometheus has scraped the API and both workers by their names in the compose network.
scraped() {
  inside curl -sS -m 10 --data-urlencode 'query=sum(up)' http://127.0.0.1:9090/api/v1/query | grep -q ',"3"\]'
}

# Runs a command until it succeeds, for at most LIMIT seconds.
until_so() {
  local end=$((SECONDS + LIMIT))
  until "$@"; do
    [ $SECONDS -lt $end ] || fail "not within $LIMIT s: $*"
    sleep 1
  done
}

ask() {
  say "prediction"
  predict | tee "$work/answer"
  echo
  [ "$(field label <"$work/answer")" = ship ]
  until_so scraped
  echo "Prometheus scrapes three processes"
}

# True once the task has ended.
task_ended() {
  state=$(call "/tasks/$task" | field state)
  [ "$state" != queued ] && [ "$state" != running ]
}

# The adaptation worker writes the task to the volume; both workers then read it there.
adapt() {
  say "adaptation"
  task=$(call /tasks -H 'Content-Type: application/json' -d "$TASK" | field id)
  local began=$SECONDS
  until_so task_ended
  echo "task $task: $state after $((SECONDS - began)) s"
  [ "$state" = ready ]
  docker compose --profile cpu stop adaptation-cpu
  echo "the task, by worker-cpu alone:"
  predict -F "task=$task" | field label
  docker compose --profile cpu up --detach --wait --no-build adaptation-cpu
}

drain() {
  say "drain"
  predict -F n=2000 >"$work/answer" &
  local asked=$! began
  sleep 3
  began=$SECONDS
  docker compose --profile cpu stop worker-cpu
  echo "worker-cpu stopped in $((SECONDS - began)) s"
  [ $((SECONDS - began)) -lt "$DRAIN" ]
  wait "$asked"
  [ "$(field label <"$work/answer")" = ship ] # The other worker finished the job.
  compose stop
  ended=$(docker ps --all --format '{{.Names}} {{.Status}}')
  echo "$ended"
  [ "$(grep -c 'Exited (0)' <<<"$ended")" = 5 ]
}

trap clean_up EXIT
install_tools
start_engine
git clone --quiet "$repository" "$work/source"
cd "$work/source"
build_stand_ins
build_images
start_fleet
ask
adapt
drain
say "all is well"
