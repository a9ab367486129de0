# Shared by the scripts beside it; sourced, never run. Owns .venv and the stamp in it.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv

say() { printf '%s\n' "tandem: $*" >&2; }

die() {
    say "$*"
    exit 1
}

# What is installed: cpu or gpu. TANDEM_EXTRA decides; else a GPU that answers does.
extra() {
    if [[ -n ${TANDEM_EXTRA:-} ]]; then
        [[ $TANDEM_EXTRA == cpu || $TANDEM_EXTRA == gpu ]] ||
            die "TANDEM_EXTRA: got '$TANDEM_EXTRA'; allowed: cpu, gpu"
        echo "$TANDEM_EXTRA"
    elif nvidia-smi -L >/dev/null 2>&1; then
        echo gpu
    else
        echo cpu
    fi
}

# Makes .venv with everything in it. Does nothing when what it depends on has not changed.
set_up() {
    local wanted
    wanted=$(extra) || exit 1
    wanted="$wanted $(cat pyproject.toml requirements/*.txt | sha256sum)"
    [[ $(cat "$venv/.tandem" 2>/dev/null) == "$wanted" ]] && return
    rm -f "$venv/.tandem"
    make_venv
    if [[ $wanted == gpu* ]]; then
        install_gpu
    else
        install_cpu
    fi
    echo "$wanted" >"$venv/.tandem"
    say "set up in $SECONDS s"
}

# A venv of Python 3.11 with uv in it. Where there is no Python 3.11, uv brings one.
make_venv() {
    [[ -x $venv/bin/uv ]] && "$venv/bin/python" -c 'import sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null && return
    rm -rf "$venv"
    if command -v python3.11 >/dev/null && python3.11 -c '' 2>/dev/null; then
        say "making .venv"
        python3.11 -m venv "$venv" || die "no venv; on Debian: apt-get install python3.11-venv"
    else
        say "no python3.11 here: uv brings one"
        local tools
        tools=$(mktemp -d)
        python3 -m venv "$tools" || die "python3 with venv is needed; on Debian: apt-get install python3-venv"
        install_uv "$tools"
        "$tools/bin/uv" venv -q --python 3.11 --seed "$venv"
        rm -rf "$tools"
    fi
    install_uv "$venv"
}

install_uv() { "$1/bin/python" -m pip install -q --require-hashes -r requirements/uv.txt; }

uv_install() { "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; }

# The pinned list; --no-deps, since vLLM asks for torchvision and its like, whose builds on the
# package index are for CUDA and break beside the CPU's torch.
install_cpu() {
    say "installing packages and torch (some minutes on a slow line)"
    install_torch &
    local torch=$!
    # Compiled once here, else each of the first start's processes would compile the same modules.
    uv_install --no-deps --require-hashes --compile-bytecode -r requirements/cpu.txt || { wait "$torch" || true; die "the packages could not be installed"; }
    wait "$torch" || die "torch could not be installed"
    uv_install --no-deps --no-build-isolation --editable .
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        say "vLLM needs libnuma; on Debian: apt-get install libnuma1"
}

# torch comes from where pip is set up to look, else from PyTorch's own index, for it alone.
install_torch() {
    local pip=("$venv/bin/python" -m pip install -q --no-deps --require-hashes -r requirements/torch-cpu.txt)
    "${pip[@]}" 2>/dev/null || "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu
}

# On GPUs the wheels of the package index are the right ones. Not pinned.
install_gpu() {
    say "installing for GPUs"
    uv_install --editable ".[gpu,dev]"
}
