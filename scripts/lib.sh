# Functions of the other scripts; sourced, not run. Creates and updates .venv and .venv-clients.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
clients=$root/.venv-clients

say() { printf '%s\n' "tandem: $*" >&2; }

die() {
    say "$*"
    exit 1
}

# Prints the extra to install, cpu or gpu: TANDEM_EXTRA, or gpu if nvidia-smi finds a GPU.
extra() {
    if [[ -n ${TANDEM_EXTRA:-} ]]; then
        [[ $TANDEM_EXTRA == cpu || $TANDEM_EXTRA == gpu ]] ||
            die "TANDEM_EXTRA must be cpu or gpu, not '$TANDEM_EXTRA'"
        echo "$TANDEM_EXTRA"
    elif nvidia-smi -L >/dev/null 2>&1; then
        echo gpu
    else
        echo cpu
    fi
}

# Creates .venv with all dependencies. "set_up cluster" leaves out those of development, such as pandas,
# which every process of Serve imports if it is installed. Does nothing if .venv is up to date.
set_up() {
    local kind wanted installed prefix=""
    kind=$(extra) || exit 1
    wanted="$kind $(cat pyproject.toml requirements/*.txt | sha256sum)"
    installed=$(cat "$venv/.tandem" 2>/dev/null) || true
    [[ $installed == "$wanted" ]] && return
    # An environment of development stays one, because what it has more would not be removed.
    if [[ ${1:-} == cluster && ( -z $installed || $installed == *" cluster" ) ]]; then
        prefix=image-
        wanted="$wanted cluster"
        [[ $installed == "$wanted" ]] && return
    fi
    rm -f "$venv/.tandem"
    make_venv
    "install_$kind" "requirements/$prefix$kind.txt"
    echo "$wanted" >"$venv/.tandem"
    say "set up in $SECONDS s"
}

# Creates a Python 3.11 venv that contains uv. If there is no Python 3.11, uv downloads it.
make_venv() {
    [[ -x $venv/bin/uv ]] && "$venv/bin/python" -c 'import sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null && return
    rm -rf "$venv"
    if command -v python3.11 >/dev/null && python3.11 -c '' 2>/dev/null; then
        say "creating .venv"
        python3.11 -m venv "$venv" || die "cannot create a venv; on Debian: apt-get install python3.11-venv"
    else
        say "python3.11 not found; uv downloads it"
        local tools
        tools=$(mktemp -d)
        python3 -m venv "$tools" || die "cannot create a venv with python3; on Debian: apt-get install python3-venv"
        install_uv "$tools"
        "$tools/bin/uv" venv -q --python 3.11 --seed "$venv"
        rm -rf "$tools"
    fi
    install_uv "$venv"
}

install_uv() { "$1/bin/python" -m pip install -q --require-hashes -r requirements/uv.txt; }

uv_install() { "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; }

# Installs a pinned list. --no-deps because vLLM requires torchvision and similar packages, whose
# wheels on the package index are built for CUDA and fail with the CPU build of torch.
install_cpu() {
    say "installing packages and torch (takes minutes on a slow connection)"
    install_torch &
    local torch=$!
    # Compile to bytecode now; otherwise every process of the first start compiles the same modules.
    uv_install --no-deps --require-hashes --compile-bytecode -r "$1" || { wait "$torch" || true; die "cannot install the packages"; }
    wait "$torch" || die "cannot install torch"
    uv_install --no-deps --no-build-isolation --editable .
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        say "vLLM requires libnuma; on Debian: apt-get install libnuma1"
}

# Installs torch from pip's configured index, or else from PyTorch's index.
install_torch() {
    local pip=("$venv/bin/python" -m pip install -q --no-deps --require-hashes -r requirements/torch-cpu.txt)
    "${pip[@]}" 2>/dev/null || "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu
}

# Installs the pinned list $1 with torch, whose wheel on the package index is built for CUDA.
install_gpu() {
    say "installing packages for GPUs (several GB)"
    uv_install --no-deps --require-hashes --compile-bytecode -r "$1" ||
        die "cannot install the packages"
    uv_install --no-deps --no-build-isolation --editable .
}

# Creates .venv-clients with the vendors' clients, whose dependencies must not constrain vLLM's.
# Needs .venv. Does nothing if the list has not changed.
set_up_clients() {
    local wanted started=$SECONDS
    wanted=$(sha256sum <requirements/clients.txt)
    [[ $(cat "$clients/.tandem" 2>/dev/null) == "$wanted" ]] && return
    rm -rf "$clients"
    "$venv/bin/uv" venv -q --python "$venv/bin/python" "$clients"
    "$venv/bin/uv" pip install -q --python "$clients/bin/python" --no-deps --require-hashes \
        --compile-bytecode -r requirements/clients.txt || die "cannot install the clients"
    echo "$wanted" >"$clients/.tandem"
    say "set up the clients in $((SECONDS - started)) s"
}
