# The suite with what it needs, for a container's own checkout in /emoe or another that one mounts there:
#   docker build --tag emoe .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/emoe" emoe snakemake --cores all
# pip's torch comes with CUDA; a smaller image for CPUs: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim-trixie

# git knows which commit made a number; g++ compiles the sparse path's kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*' \
    && useradd --create-home --uid 1000 emoe \
    && chmod 1777 /home/emoe \
    && install --directory --owner emoe /emoe

# whoever it runs as has a name and a home
ENV HOME=/home/emoe USER=emoe PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
ARG PIP_EXTRA_INDEX_URL

# the dependencies, in the versions by which the numbers were blessed; installed again only if these files change
COPY pyproject.toml constraints.txt /tmp/dependencies/
# hadolint ignore=DL3013
RUN pip install --constraint /tmp/dependencies/constraints.txt '/tmp/dependencies[suite,mini]'

WORKDIR /emoe
COPY --chown=emoe . .
RUN pip install --no-deps --editable .

USER 1000
CMD ["snakemake", "--cores", "all"]
