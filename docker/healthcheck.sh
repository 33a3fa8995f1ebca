# The container's health check: exit code 0 when /readyz says 200. In bash, because Python's start alone takes longer on
# a busy host than some checks may.
exec 3<>"/dev/tcp/127.0.0.1/${DDPM_PORT:-8000}" || exit 1
printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
read -r -t 8 _ status _ <&3
echo "/readyz: ${status:-no answer}"
[ "$status" = 200 ]
