#!/usr/bin/env bash
# Install Debian's Chromium, which the playground's tests and screenshot drive. Needs root and apt; does nothing if there is one.
set -euo pipefail
if command -v chromium chromium-browser google-chrome > /dev/null; then
    exit 0
fi
apt-get -o Acquire::Retries=3 update -qq
DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends chromium
