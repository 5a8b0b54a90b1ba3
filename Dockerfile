# The daemon alone: no CUDA, no torch, no compiler, not root.
#
#   docker build -t kvd:0.1.0 .
#   docker run -v kvd:/run/kvd -p 127.0.0.1:7441:7441 -e KVD_POOL=8GiB --memory 8704m --ulimit memlock=-1 kvd:0.1.0
#
# With -v /dev/shm:/dev/shm the pool outlives the container. With -v /mnt/nvme/kvd:/var/lib/kvd (for user 7440 to write),
# -e KVD_SPILL_DIR=/var/lib/kvd and -e KVD_SPILL=200GiB chunks that leave the pool go to disk.
#
# The pool counts towards the container's memory limit. Engines find the daemon at /run/kvd/kvd.sock when they mount the
# same volume there; they need nothing else from this container, no shared /dev/shm either. Root and user 7440 are let
# in; any other user, and a root without capabilities, needs group 7440 (docker run --group-add 7440).
#
# BASE is any Debian with Python 3.11 or newer.
ARG BASE=python:3.12-slim
# hadolint ignore=DL3006
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY kvd kvd
COPY kvd_client kvd_client
RUN python3 -m venv --without-pip /opt/kvd \
 && pip --disable-pip-version-check --python /opt/kvd/bin/python install --no-cache-dir .

# hadolint ignore=DL3006
FROM ${BASE}
RUN groupadd --gid 7440 kvd \
 && useradd --uid 7440 --gid kvd --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin kvd \
 && install -d -o kvd -g kvd -m 0755 /run/kvd \
 && install -d -o kvd -g kvd -m 0700 /var/lib/kvd
COPY --from=build /opt/kvd /opt/kvd
ENV PATH=/opt/kvd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    KVD_SOCKET=/run/kvd/kvd.sock \
    KVD_GROUP=kvd \
    KVD_HTTP=0.0.0.0:7441
USER 7440:7440
VOLUME /run/kvd
# HTTP only: metrics and health. The two TCP ports stay on loopback, engines on this node do not need them.
EXPOSE 7441
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["kvd", "status"]
ENTRYPOINT ["kvd"]
CMD ["serve"]
