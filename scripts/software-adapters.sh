#!/bin/bash
# Several software Vulkan and GL adapters side by side, for tests without a GPU (Debian 12, x86-64, as root).
# usage: scripts/software-adapters.sh DEST; then: . DEST/env
# Gives one process: lavapipe of Mesa 22.3 (installed), lavapipe and GL llvmpipe of Mesa 25.0 and SwiftShader (unpacked under DEST, not installed).
set -euo pipefail
dest=${1:?usage: software-adapters.sh DEST}; mkdir -p "$dest"; dest=$(cd "$dest" && pwd)
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 libegl1 libegl-mesa0 libgl1-mesa-dri >/dev/null
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT; chmod 755 "$tmp"
if [ ! -e "$dest/libvk_swiftshader.so" ]; then # one library inside a package of the browser
  (cd "$tmp" && apt-get download -qq chromium-common 2>/dev/null && dpkg-deb --fsys-tarfile chromium-common_*.deb | tar -xf - ./usr/lib/chromium/libvk_swiftshader.so)
  mv "$tmp/usr/lib/chromium/libvk_swiftshader.so" "$dest/"
fi
if [ ! -e "$dest/mesa25/libvulkan_lvp.so" ]; then # backports, through the archive that this machine's own apt uses, with lists of its own
  site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)
  mkdir -p "$tmp"/{lists/partial,cache/archives/partial,x} "$dest/mesa25"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site bookworm-backports main" >"$tmp/list"
  own=(-qq -o "Dir::Etc::sourcelist=$tmp/list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$tmp/lists" -o "Dir::Cache=$tmp/cache")
  if (cd "$tmp" && apt-get "${own[@]}" update && apt-get "${own[@]}" download {mesa-vulkan-drivers,mesa-libgallium,libegl-mesa0,libgbm1}/bookworm-backports 2>/dev/null); then
    for deb in "$tmp"/{mesa-,libegl,libgbm}*.deb; do dpkg-deb -x "$deb" "$tmp/x"; done
    cp -a "$tmp"/x/usr/lib/x86_64-linux-gnu/{libvulkan_lvp.so,libgallium-*.so,libEGL_mesa.so*,libgbm.so*} "$dest/mesa25/"
    cp -a "$tmp/x/usr/lib/x86_64-linux-gnu/gbm" "$dest/mesa25/" 2>/dev/null || true
  else
    echo "no backports here: going on without Mesa 25" >&2
  fi
fi
icd() { printf '{"file_format_version":"1.0.0","ICD":{"library_path":"%s","api_version":"%s"}}\n' "$2" "$3" >"$dest/$1.json"; drivers=$dest/$1.json${drivers:+:$drivers}; }
drivers=
icd swiftshader "$dest/libvk_swiftshader.so" 1.1.0
icd lvp22 /usr/lib/x86_64-linux-gnu/libvulkan_lvp.so 1.3.230
mkdir -p "$dest/xdg"; chmod 700 "$dest/xdg"
{
  if [ -e "$dest/mesa25/libvulkan_lvp.so" ]; then
    icd lvp25 "$dest/mesa25/libvulkan_lvp.so" 1.4.305
    printf '{"file_format_version":"1.0.0","ICD":{"library_path":"%s"}}\n' "$dest/mesa25/libEGL_mesa.so.0" >"$dest/egl25.json"
    echo "export __EGL_VENDOR_LIBRARY_FILENAMES=$dest/egl25.json LD_LIBRARY_PATH=$dest/mesa25\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
  fi
  echo "export VK_DRIVER_FILES=$drivers XDG_RUNTIME_DIR=$dest/xdg MESA_SHADER_CACHE_DIR=$dest/shader-cache LP_NUM_THREADS=0 LIBGL_ALWAYS_SOFTWARE=1"
} >"$dest/env"
