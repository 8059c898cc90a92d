-- ARGV: job id. The group stands before its first entry, so that a worker sees every entry.
local stream = 'fx:{ft}:q'
if redis.call('EXISTS', stream) == 0 then redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM') end
return redis.call('XADD', stream, '*', 'job_id', ARGV[1])
