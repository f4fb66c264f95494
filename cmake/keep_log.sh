# Runs a compiler and keeps what it says in OBJECT.log; what ptxas reports of each kernel is shown there only.
for argument; do
  [ "$previous" = -o ] && log=$argument.log
  previous=$argument
done
"$@" >"$log" 2>&1
status=$?
grep -vE '^ptxas info|bytes stack frame|^$' "$log" >&2
exit $status
