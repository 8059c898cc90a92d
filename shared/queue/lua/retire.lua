-- A worker that drained says goodbye. ARGV: worker, lanes. A consumer with pending entries stays, so that
-- these can be claimed by another.
redis.call('DEL', PREFIX .. 'wk:' .. ARGV[1])
redis.call('ZREM', PREFIX .. 'wks', ARGV[1])
for i = 2, #ARGV do
  local lane = lane_key(ARGV[i])
  if redis.call('EXISTS', lane) == 1 and #redis.call('XPENDING', lane, GROUP, '-', '+', 1, ARGV[1]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', lane, GROUP, ARGV[1])
  end
end
return redis.status_reply('OK')
