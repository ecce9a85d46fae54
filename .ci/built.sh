# Shared by the scripts of this folder that build a tool within its own module; POSIX sh, to be sourced after lib.sh.
#
# Built within itself, a tool gets exactly the dependencies that its own go.mod and go.sum name; SUM pins those. The script
# says NAME, TITLE, VERSION, NEEDED, MODULE, RELEASE, SUM and MINUTES, and defines
#
#   version_of FILE     prints the version of a tool, or nothing
#   usable VERSION      whether one on PATH will do
#   compile             in the folder of the module: builds $work/$NAME
#   give_up             says on one screen what to do, and ends with 1
#
# and then calls have "$@".

BIN=$CACHE/bin
PINNED=$BIN/$NAME-$VERSION
LABEL="${STEP:+$STEP }$TITLE $VERSION"

found() {
    printf '%s\n' "$1"
    exit 0
}

find_existing() {
    on_path=$(command -v "$NAME" || :)
    if [ -n "$on_path" ]; then
        version=$(version_of "$on_path")
        usable "$version" && found "$on_path"
        say "Passing over $on_path: ${version:+version }${version:-it does not answer \`version\`}; $NEEDED is needed."
    fi
    [ -x "$PINNED" ] && [ -x "$BIN/$NAME" ] && found "$BIN/$NAME"
    return 0
}

# field NAME: of the JSON that `go mod download` printed, one field a line.
field() { sed -n "s/^[[:space:]]*\"$1\": \"\(.*\)\",\{0,1\}\$/\1/p" "$work/module.json"; }

build() {
    unset GOOS GOARCH
    (cd "$work" && GOFLAGS='' go mod download -json "$MODULE@$RELEASE" >module.json) || {
        say "$MODULE $RELEASE can not be had: $(field Error)"
        return 1
    }
    if [ "$(field Sum)" != "$SUM" ]; then
        say "The sum of $MODULE $RELEASE is not $SUM but \"$(field Sum)\"."
        return 1
    fi
    (cd "$(field Dir)" && compile)
}

# A half-made file is never at the final path.
keep() {
    version=$(version_of "$work/$NAME")
    if [ "$version" != "$VERSION" ]; then
        say "What was built is not $TITLE $VERSION for this machine: its version is \"$version\"."
        return 1
    fi
    mv -f "$work/$NAME" "$PINNED"
    link
}

link() {
    ln -s "$NAME-$VERSION" "$work/link"
    mv -f "$work/link" "$BIN/$NAME"
}

have() {
    find_existing
    [ "${1:-}" = --find ] && exit 1
    mkdir -p "$BIN"
    work=$(mktemp -d "$BIN/.install.XXXXXX")
    if [ -x "$PINNED" ]; then
        link
        found "$BIN/$NAME"
    fi
    if command -v go >/dev/null 2>&1; then
        step "$LABEL: go build, about $MINUTES minutes" build && keep && found "$BIN/$NAME"
    fi
    give_up
}
