-- CANCEL. ARGV: rid. A queued request ends now; a running one at its worker's next emit or beat.
local state = redis.call('HGET', req_key(ARGV[1]), 'state')
if state == 'queued' then
  terminate(ARGV[1], 'cancelled', '')
elseif state == 'running' then
  redis.call('HSET', req_key(ARGV[1]), 'cancel', 1)
end
return redis.status_reply('OK')
